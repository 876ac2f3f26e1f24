"""A resolver, as Docker and podman give each container: A records from a hosts file."""

import socket
import sys
from pathlib import Path

ADDRESS = 1  # the type of question that it answers


def answer(query: bytes, names: dict[str, str]) -> bytes:
    """The answer to one question; a name that is not known does not exist."""
    labels, at = list[str](), 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode().lower())
        at += length + 1
    question = query[12 : at + 5]
    address = names.get(".".join(labels))
    found = address is not None and int.from_bytes(query[at + 1 : at + 3], "big") == ADDRESS
    record = b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + socket.inet_aton(address or "") if found else b""
    flags = bytes([0x81, 0x80 if address else 0x83])
    return query[:2] + flags + bytes([0, 1, 0, found, 0, 0, 0, 0]) + question + record


def main() -> None:
    lines = Path(sys.argv[1]).read_text().splitlines()
    names = {name: address for address, name in (line.split() for line in lines)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((sys.argv[2], 53))
        while True:
            query, who = server.recvfrom(512)
            server.sendto(answer(query, names), who)


if __name__ == "__main__":
    main()
