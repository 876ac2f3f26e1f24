"""Keys and commands that are gone, and what to use in their place: one line each."""

KEYS: dict[str, str] = {
    "privacy.clipping": "gradients are clipped to privacy.max-grad-norm",
    "privacy.accountant": "Opacus' PRV accountant computes epsilon",
    "home.batch-size": "it is 32",
    "home.learning-rate": "it is 0.005",
    "home.head-learning-rate": "it is 0.05",
    "home.proximal": "an own model is a mean with the shared one (home.method = interpolate)",
    "home.epsilon": "models at home have no DP and stay at the institution",
    "adapter.ranks": "all institutions have adapter.rank",
    "federation.residual-rank": "residuals have a rank of at most 64",
    "federation.min-updates": "a round counts with one valid update, or as federation.robust needs",
    "federation.max-update-norm": "federation.robust bounds the influence of an institution",
    "federation.average-last": "the adapters of the last fifth of the rounds are averaged",
    "federation.evaluate-every": "the server evaluates six times, and after the last round",
    "privacy.size-noise": "federation.weighting is uniform, public-size or records",
    "privacy.institution-delta": "it is a power of ten below 1 / (10 x institutions)",
    "federation.aggregate": "federation.strategy takes module:object",
    "federation.byzantine": "federation.robust takes the share, such as multi-krum:0.2",
    "data.delimiter": "the delimiter of a .csv file is read from its header",
    "data.encoding": "convert the file to UTF-8, as in: iconv -f LATIN1 -t UTF-8 old.csv > new.csv",
}
"""A key that was removed -> what to use, the end of the sentence "KEY is gone; ..."."""
COMMANDS: dict[str, str] = {
    "cache": "records are tokenised anew by each run, and no text of them is stored",
    "compare": "put the runs into a sweep, whose report compares them, or read their result.json",
    "deploy add": "run `fedlora deploy init DIR --institutions NAME` again",
    "deploy fingerprint": "`fedlora deploy check SETTINGS` shows fingerprints",
    "deploy forget": "run `fedlora node SETTINGS --forget RUN`",
    "deploy reachable": "run `fedlora deploy check URL --ca CA`",
    "deploy register": "the server registers keys by itself; see its log",
    "deploy renew": "run `fedlora deploy init DIR` again",
    "deploy results": "read result.json in the run's directory",
    "deploy resume": "run `fedlora deploy submit FILE --name NAME` again",
    "deploy status": "run `fedlora deploy list`",
    "export": "vLLM reads RUN_DIR/adapter as it is; docs/files.md says how llama.cpp takes it",
    "push": "upload the adapter: hf upload OWNER/NAME RUN_DIR/adapter",
    "watch": "open RUN_DIR/report.html",
}
"""A command that was removed -> what to use, the end of the sentence "COMMAND is gone; ..."."""
