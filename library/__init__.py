"""What ``from fedlora import ...`` gives: runs, and their results, in a Python process."""
