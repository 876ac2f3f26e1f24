"""`fedlora verify`: a changed field of privacy.json, or a changed file of its run, is found."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from cli.main import app
from deployment import keys
from fedlora.config import config as configuration
from fedlora.config.config import from_flat
from fedlora.errors import InputError
from fedlora.runs import seal
from server import binding, privacy_statement, verification

runner = CliRunner()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Where the first test leaves its run for the others."""
    return tmp_path_factory.mktemp("template") / "run"


@pytest.fixture
def run_directory(tiny_config, simulate_run, template):
    """A complete run under DP."""
    config = tiny_config(**{"privacy.noise": "secure", "federation.rounds": 2})
    return made_once(config, simulate_run, template)


def made_once(config, simulate_run, template):
    """The directory of a run, a copy of the one that the first test made."""
    if template.exists():
        shutil.copytree(template, config.run_dir)
    else:
        simulate_run(config)
        shutil.copytree(config.run_dir, template)
    return Path(config.run_dir)


def states(directory, ca=None):
    """Check -> its state."""
    return {c.name: c.state for c in verification.verify(directory, ca)}


def failing(directory, ca=None):
    return {name for name, state in states(directory, ca).items() if state == "failed"}


def statement(directory):
    return json.loads((directory / "privacy.json").read_text())


def write(directory, content, signer=None, *, sealed=True):
    """Writes privacy.json; with a seal that is right again, as somebody would who forges it."""
    content = {key: value for key, value in content.items() if key != seal.SEAL or not sealed}
    made = seal.sealed(content, signer) if sealed else content
    (directory / "privacy.json").write_text(json.dumps(made))


def leaves(node, path=()):
    """The path and value of every single value."""
    if isinstance(node, dict | list):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in pairs:
            yield from leaves(value, (*path, key))
    else:
        yield path, node


def changed(content, path, value):
    content = json.loads(json.dumps(content))
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return content


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value * 1.01 + 1e-9 if isinstance(value, float) else value + 1
    return f"{value[:-1]}{'a' if value[-1:] != 'a' else 'b'}"


def test_an_untouched_run_is_verified_and_only_the_signature_is_left_out(run_directory):
    found = states(run_directory)
    assert found.pop("signature") == "skipped"
    assert set(found.values()) == {"ok"} and len(found) == 10
    done = runner.invoke(app, ["verify", str(run_directory), "--json"])
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and said["verified"] and len(said["checks"]) == 11
    assert {"name", "state", "detail"} == set(said["checks"][0])


def test_every_field_is_covered_by_the_seal(run_directory):
    content = statement(run_directory)
    paths = [path for path, _ in leaves(content)]
    assert len(paths) > 80
    for path, value in leaves(content):
        with pytest.raises(ValueError, match="changed after it was written"):
            seal.check_digest(changed(content, path, other(value)))


UNPROVABLE = {"ledger_epsilon", "ledger_epsilon_alone", "ledger_delta", "ledger_limit"}
"""Figures that an institution alone knows; no file of the run proves them."""


def test_every_field_that_the_run_s_files_prove_is_found_changed_under_a_new_seal(run_directory):
    content, tried = statement(run_directory), 0
    bank = next(iter(content["institutions"]))
    for path, value in leaves(content):
        if path[0] == seal.SEAL or (path[0] == "institutions" and path[1] != bank):
            continue
        if path[-1] in UNPROVABLE or "institution_says" in path or path == ("run", "finished"):
            continue
        write(run_directory, changed(content, path, other(value)))
        if path == ("run", "mode"):  # whatever is no simulation needs a CA
            with pytest.raises(InputError, match="--ca"):
                failing(run_directory)
        else:
            assert failing(run_directory), path
        tried += 1
    assert tried > 35


@pytest.mark.parametrize("part", ["run", "institutions", "odds", "protects", "adjacency"])
def test_a_part_that_is_missing_or_of_another_kind_is_no_traceback(run_directory, part):
    content = statement(run_directory)
    for value in (7, "text", [1], {"id": 1}, None):
        write(run_directory, {**content, part: value})
        done = runner.invoke(app, ["verify", str(run_directory)])
        assert done.exit_code in (2, 3) and isinstance(done.exception, SystemExit), value


@pytest.mark.parametrize(
    "name",
    ["config.toml", "environment.json", "rounds.jsonl", "result.json",
     "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/README.md",
     "adapter/mean_pooling.py"],
)  # fmt: skip
def test_every_file_of_the_run_that_is_changed_is_found(run_directory, name):
    file = run_directory / name
    before = file.read_bytes()
    file.write_bytes(before + b"\n")
    assert "files" in failing(run_directory)
    done = runner.invoke(app, ["verify", str(run_directory)])
    assert done.exit_code == 3 and "NOT VERIFIED" in done.stdout and name in done.stdout


def test_files_that_are_added_or_lost_are_found(run_directory):
    (run_directory / "adapter" / "modeling.py").write_text("import os")
    assert failing(run_directory) == {"files"}
    (run_directory / "adapter" / "modeling.py").unlink()
    elsewhere = run_directory.parent / "elsewhere"
    elsewhere.mkdir()
    for target in (elsewhere, elsewhere / "nothing"):
        (run_directory / "adapter" / "more").symlink_to(target)
        assert failing(run_directory) == {"files"}
        (run_directory / "adapter" / "more").unlink()
    assert failing(run_directory) == set()
    (run_directory / "adapter" / "README.md").unlink()
    assert failing(run_directory) == {"files"}


def test_other_records_and_other_base_weights_are_found(
    run_directory, complaints, tmp_path, tiny_encoder
):
    config = configuration.load(run_directory / "config.toml")
    text = complaints.read_text().replace("mortgage", "lender", 1)
    (tmp_path / "other.csv").write_text(text)
    shutil.copytree(tiny_encoder, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)

    def moved(**values):
        (run_directory / "config.toml").write_text(config.replace(values).to_toml())
        return failing(run_directory)

    assert "records" in moved(**{"data.source": str(tmp_path / "other.csv")})
    assert "base model" in moved(**{"model.name": str(tmp_path / "base")})
    gone = {"data.source": str(tmp_path / "gone.csv")}
    (run_directory / "config.toml").write_text(config.replace(gone).to_toml())
    assert states(run_directory)["records"] == "skipped"


def test_the_fingerprint_of_records_needs_its_key(run_directory):
    key = run_directory / binding.RECORDS_KEY
    assert key.stat().st_mode & 0o777 == 0o600
    said = statement(run_directory)["run"]["records"]
    assert said != hashlib.sha256(key.read_bytes()).hexdigest()
    key.unlink()
    assert states(run_directory)["records"] == "skipped"
    for damaged in ("", "00", "no key"):
        key.write_text(damaged)
        assert failing(run_directory) == {"records"}
    key.write_text("00" * 32)
    assert failing(run_directory) == {"records"}


@pytest.fixture
def level_directory(tiny_config, simulate_run, template):
    """A complete run that promises something to institutions too."""
    config = tiny_config(
        **{
            "privacy.noise": "secure",
            "privacy.institution-epsilon": 5.0,
            "federation.rounds": 1,
        }
    )
    return made_once(config, simulate_run, template.with_name("level"))


def test_the_second_mechanism_is_computed_anew(level_directory):
    directory = level_directory
    assert not failing(directory)
    content = statement(directory)
    for key in ("epsilon", "noise_multiplier", "delta", "steps"):
        path = ("institution_level", key)
        write(directory, changed(content, path, other(content["institution_level"][key])))
        assert "epsilon" in failing(directory), key


def test_an_institution_that_is_missing_is_found(run_directory):
    content = statement(run_directory)
    content["institutions"].popitem()
    write(run_directory, content)
    assert "epsilon" in failing(run_directory)


def test_each_figure_of_the_odds_is_of_the_institution_where_it_is_largest():
    """All have one epsilon; the small one has a larger delta, the large one less noise."""
    config = from_flat({"privacy.noise": "secure"})
    alike = {"steps": 30, "sample_rate": 0.25}
    small = {"epsilon": 7.9955, "delta": 1e-3, "noise_multiplier": 1.0, **alike}
    large = {"epsilon": 7.9957, "delta": 1e-5, "noise_multiplier": 1.13, **alike}
    fewer = small | {"steps": 3, "epsilon": 2.0}
    both = privacy_statement.odds_of(config, {"S": small, "F": fewer, "L": large}, {})["odds"]
    alone = [
        privacy_statement.odds_of(config, {"X": one | {"epsilon": 7.9957}}, {})["odds"]
        for one in (small, large)
    ]
    assert both["exceeded"] == max(one["exceeded"] for one in alone) > alone[1]["exceeded"]
    assert both["right"] == max(one["right"] for one in alone) > alone[1]["right"]
    for rate, share in both["found"].items():
        assert share == max(one["found"][rate] for one in alone)


def test_a_sum_of_fewer_institutions_than_the_promise_needs_is_found(tiny_config, simulate_run):
    config = tiny_config(
        **{
            "privacy.noise": "secure",
            "privacy.trust": "secure-aggregation",
            "privacy.honest": 2,
            "privacy.colluding": 1,
            "privacy.delta": 1e-4,
            "federation.weighting": "public-size",
            "training.local-steps": 1,
            "training.batch-size": 0.2,
            "federation.rounds": 1,
        }
    )
    simulate_run(config)
    directory = Path(config.run_dir)
    assert not failing(directory)
    content = statement(directory)
    for key in ("institutions", "least_survivors"):
        path = ("secure_aggregation", key)
        write(directory, changed(content, path, content["secure_aggregation"][key] - 1))
        assert "epsilon" in failing(directory), key
    rounds = directory / "rounds.jsonl"
    line = json.loads(rounds.read_text())
    rounds.write_text(json.dumps(line | {"updates": 2}) + "\n")
    content["run"]["files"] = binding.digests(directory)
    write(directory, content)
    assert failing(directory) == {"epsilon"}


def test_an_unfinished_or_unbound_run_is_bad_input(run_directory, tmp_path):
    done = runner.invoke(app, ["verify", str(tmp_path / "none")])
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1
    content = statement(run_directory)
    del content[seal.SEAL]
    write(run_directory, content, sealed=False)
    done = runner.invoke(app, ["verify", str(run_directory)])
    assert done.exit_code == 2 and "not bound" in done.stderr


# A deployment's statement and its signature.


@pytest.fixture(scope="session")
def federation(tmp_path_factory):
    """The keys of a federation: its CA, and the server's directory."""
    folder = tmp_path_factory.mktemp("keys")
    authority = keys.make_authority()
    certificate, key = keys.make_signer(authority)
    (folder / "ca.crt").write_bytes(authority.pem)
    (folder / seal.CERTIFICATE).write_bytes(certificate)
    (folder / seal.KEY).write_bytes(key)
    return folder, authority


@pytest.fixture
def deployed(run_directory, federation):
    """The directory of a deployment: the simulation's, with its configuration and statement."""
    folder, _ = federation
    flat = configuration.load(run_directory / "config.toml").flat()
    config = configuration.from_flat(
        {
            **flat,
            "data.source": "institutions",
            "data.institutions": 4,
            "data.labels": '["card", "fraud", "loan"]',
        }
    )
    (run_directory / "config.toml").write_text(config.to_toml())
    content = statement(run_directory)
    content["run"] |= {"mode": "deployment", "records": None}
    content |= privacy_statement.promise(config, follows=False)
    content["run"]["files"] = binding.digests(run_directory)
    signer = seal.Signer.open(folder)
    assert signer
    write(run_directory, content, signer)
    return run_directory


def test_a_deployment_s_statement_is_signed_and_needs_the_ca(deployed, federation, monkeypatch):
    folder, _ = federation
    assert set(states(deployed, folder / "ca.crt").values()) == {"ok"}
    monkeypatch.delenv(binding.KEYS, raising=False)
    done = runner.invoke(app, ["verify", str(deployed)])
    assert done.exit_code == 2 and "--ca" in done.stderr
    monkeypatch.setenv(binding.KEYS, str(folder))
    assert runner.invoke(app, ["verify", str(deployed)]).exit_code == 0


def test_a_forged_statement_is_found_by_its_signature(deployed, federation):
    folder, authority = federation
    ca, content = folder / "ca.crt", statement(deployed)
    for path in (("institutions", "Alpha", "ledger_epsilon"), ("run", "finished")):
        value = content["run"]["finished"].replace("20", "19", 1) if "run" in path else 0.1
        forged = changed(content, path, value)
        old = forged[seal.SEAL]
        sha = seal.sealed({k: v for k, v in forged.items() if k != seal.SEAL}, None)[seal.SEAL]
        write(deployed, {**forged, seal.SEAL: {**old, **sha}}, sealed=False)
        assert failing(deployed, ca) == {"signature"}
    write(deployed, content)  # no signature at all
    assert failing(deployed, ca) == {"signature"}
    # Another federation's server, and the gateway's TLS key of this one.
    stranger = keys.make_authority()
    for certificate, key in (
        keys.make_signer(stranger),
        keys.make_server(authority, ["gateway"]),
    ):
        loaded = x509.load_pem_x509_certificate(certificate)
        private = serialization.load_pem_private_key(key, None)
        assert loaded.public_key() == private.public_key()
        write(deployed, content, seal.Signer(private, certificate.decode()))
        assert failing(deployed, ca) == {"signature"}
    # A key whose certificate did not exist yet, or no more, when the run ended.
    for year in ("1999", "2019"):
        early = changed(content, ("run", "finished"), f"{year}-01-01T00:00:00+00:00")
        write(deployed, early, seal.Signer.open(folder))
        assert failing(deployed, ca) == {"signature"}


def test_a_deployment_cannot_pass_as_a_simulation_where_the_ca_is_given(run_directory, federation):
    folder, _ = federation
    assert failing(run_directory, folder / "ca.crt") == {"signature"}


def test_in_the_server_no_unsigned_statement_passes(run_directory, federation, monkeypatch):
    """Whoever may write to the results could put a simulation's run into their place."""
    folder, _ = federation
    monkeypatch.setenv(binding.KEYS, str(folder))
    assert failing(run_directory) == {"signature"}
