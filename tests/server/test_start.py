"""A run starts from an adapter in a directory, or refuses one that does not fit."""

import dataclasses
import json
import re
import shutil

import pytest
import safetensors.torch
import torch

from experiments import report
from fedlora.config.config import INSTITUTIONS
from fedlora.data import records
from fedlora.errors import InputError
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState, kind, open_for
from fedlora.models.model_files import ONE_INSTITUTION, Origin
from fedlora.rounding import at_most
from fedlora.runs import finished_run, run_files
from fedlora.runs.model_card import source
from fedlora.wire import released
from fedlora.wire.messages import Release
from server.start import _same_records, head_start, origins, start_adapter


@pytest.fixture
def work(tiny_config):
    config = tiny_config()
    return config, trainable.load(config, records.load(config).labels)


def moved(state, parts=("A", "B", "head")):
    """The state with every tensor of these parts at another value."""
    return AdapterState({n: t + 0.5 if kind(n) in parts else t for n, t in state.items()})


def started(work, directory, **changes):
    """The start of the run with this adapter.start, and other changes of ``[adapter]``."""
    config, made = work
    adapter = dataclasses.replace(config.adapter, start=str(directory), **changes)
    return start_adapter(dataclasses.replace(config, adapter=adapter), made)


def test_without_a_directory_the_fresh_adapter_is_the_start(work):
    config, made = work
    assert start_adapter(config, made) is made.start


def test_a_saved_adapter_is_the_start(work, tmp_path):
    _, made = work
    saved = moved(made.start)
    saved.save(tmp_path / "adapter", made.model)
    found = started(work, tmp_path / "adapter")
    assert found.keys() == made.start.keys()
    assert all(torch.equal(found[name], saved[name]) for name in found)


def test_a_head_for_other_classes_is_left_out(work, tmp_path):
    _, made = work
    head = {n: torch.ones(9, *t.shape[1:]) for n, t in made.start.only(("head",)).items()}
    moved(made.start).updated(head).save(tmp_path / "adapter", made.model)
    found = started(work, tmp_path / "adapter")
    for name, tensor in found.items():
        expected = made.start[name] if kind(name) == "head" else made.start[name] + 0.5
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("head", ["labels", "zero"])
def test_a_run_can_say_what_its_head_was_made_of(tiny_config, tmp_path, head):
    config = tiny_config(**{"adapter.head": head})
    made = trainable.load(config, ("limit", "scam", "swipe"))
    words = {"labels": "head from the labels' words", "zero": "head from zeros"}
    assert head_start(config, made, made.start) == head
    assert run_files.said_of_head({"head": head}) == words[head]
    assert run_files.said_of_head({"head": "start"}) == "head from adapter.start"
    moved(made.start).save(tmp_path / "adapter", made.model)
    config = config.replace({"adapter.start": str(tmp_path / "adapter")})
    assert head_start(config, made, start_adapter(config, made)) == "start"
    (tmp_path / "adapter" / "labels.json").write_text(json.dumps(["scam", "swipe", "limit"]))
    assert head_start(config, made, start_adapter(config, made)) == "zero"


def test_a_head_beside_the_factors_of_other_classes_starts_at_zero_and_not_from_words(
    tiny_config, tmp_path
):
    config = tiny_config(**{"adapter.head": "labels"})
    made = trainable.load(config, ("limit", "scam", "swipe"))
    assert all(t.any() for n, t in made.start.only(("head",)).items() if n.endswith("weight"))
    moved(made.start).save(tmp_path / "adapter", made.model)
    (tmp_path / "adapter" / "labels.json").write_text(json.dumps(["scam", "swipe", "limit"]))
    found = started((config, made), tmp_path / "adapter")
    assert not any(tensor.any() for tensor in found.only(("head",)).values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": 4.0}, "an adapter of alpha 16; set adapter.alpha"),
        ({"method": "rslora"}, "an adapter of alpha 16; set adapter.alpha"),
    ],
)
def test_an_adapter_of_another_scale_is_refused(work, tmp_path, change, said):
    _, made = work
    made.start.save(tmp_path / "adapter", made.model)
    with pytest.raises(InputError, match=said):
        started(work, tmp_path / "adapter", **change)


def test_an_adapter_of_another_rank_or_without_its_configuration_is_refused(work, tmp_path):
    _, made = work
    place = tmp_path / "adapter"
    made.start.cut(2).save(place, made.model)
    with pytest.raises(InputError, match="does not fit this run"):
        started(work, place)
    made.start.save(place, made.model)
    (place / "adapter_config.json").write_text(json.dumps({"r": 8}))
    with pytest.raises(InputError, match=r"adapter_config.json cannot be read \(KeyError\)"):
        started(work, place)


def test_an_adapter_with_a_scale_of_its_own_for_some_layers_is_refused(work, tmp_path):
    _, made = work
    place = tmp_path / "adapter"
    made.start.save(place, made.model)
    saved = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(saved | {"alpha_pattern": {"query": 64}}))
    with pytest.raises(InputError, match="alpha_pattern"):
        started(work, place)


@pytest.mark.parametrize(
    "setting",
    [
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [1, 2]},
    ],
    ids=str,
)
def test_an_adapter_that_is_another_function_by_the_same_names_is_refused(work, tmp_path, setting):
    """PiSSA and OLoRA change the base's weights, aLoRA acts on some of the tokens."""
    _, made = work
    place = tmp_path / "adapter"
    made.start.save(place, made.model)
    saved = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(saved | setting))
    with pytest.raises(InputError, match=next(iter(setting))):
        started(work, place)


@pytest.mark.parametrize("residuals", [False, True])
def test_an_adapter_in_16_bits_is_taken_and_a_damaged_one_is_refused(work, tmp_path, residuals):
    _, made = work
    place = tmp_path / "adapter"
    moved(made.start).save(place, made.model)
    file = place / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    halves = {name: t.bfloat16() for name, t in tensors.items()}
    safetensors.torch.save_file(halves, file)
    found = open_for(place, made.start, residuals=residuals)
    assert all(t.dtype == torch.float32 for t in found.values())
    assert residuals or found.validate_against(made.start) is None
    name = next(name for name in tensors if "lora_A" in name)
    for wrong in (tensors[name][:0], tensors[name].sum(), tensors[name].flatten()):
        safetensors.torch.save_file(tensors | {name: wrong.contiguous()}, file)
        with pytest.raises(InputError, match="does not fit"):
            if residuals:
                open_for(place, made.start, residuals=True)
            else:
                started(work, place)


def test_a_missing_directory_is_refused_by_name(work, tmp_path):
    with pytest.raises(InputError, match=r"adapter\.start is .*nowhere: .*cannot be read"):
        started(work, tmp_path / "nowhere")


def test_a_head_for_as_many_other_classes_is_left_out(work, tmp_path):
    _, made = work
    moved(made.start).save(tmp_path / "adapter", made.model)
    for labels, kept in (([*made.labels], True), ([*made.labels][::-1], False)):
        (tmp_path / "adapter" / "labels.json").write_text(json.dumps(labels))
        found = started(work, tmp_path / "adapter")
        heads = [torch.equal(t, made.start[n]) for n, t in found.only(("head",)).items()]
        assert set(heads) == {not kept}


def test_a_run_goes_on_from_an_earlier_run_and_refuses_one_that_does_not_fit(
    tiny_config, simulate_run, tmp_path
):
    first = tmp_path / "first"
    before = simulate_run(tiny_config(**{"run-dir": str(first), "privacy.epsilon": float("inf")}))
    values = {
        "run-dir": str(tmp_path / "second"),
        "adapter.start": str(first),
        "federation.rounds": 1,
        "federation.server-learning-rate": 1e-7,
        "privacy.epsilon": float("inf"),
    }
    after = simulate_run(tiny_config(**values))
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)

    def refused(words, **changes):
        config = tiny_config(**(values | changes))
        made = trainable.load(config, records.load(config).labels)
        with pytest.raises(InputError, match=words):
            start_adapter(config, made)

    secure = {"privacy.epsilon": 8.0, "privacy.noise": "secure"}
    for start in (first, first / "adapter"):
        words = "a run without DP on the same data.source"
        refused(words, **secure, **{"adapter.start": str(start)})
    copy = tmp_path / "copy.csv"  # the same records under another name
    shutil.copy(tiny_config().data.source, copy)
    words = "a run without DP on the same data.source"
    refused(words, **secure, **{"data.source": str(copy)})
    with copy.open("a") as file:
        file.write(copy.read_text().splitlines()[-1] + "\n")
    config = tiny_config(**(values | secure | {"data.source": str(copy)}))
    start_adapter(config, trainable.load(config, records.load(config).labels))
    result = json.loads((first / "result.json").read_text())
    result["base"]["digest"] = "0" * 64
    (first / "result.json").write_text(json.dumps(result))
    refused("has other weights")
    (first / "result.json").unlink()
    refused("adapter.start is .* holds no complete run")


def test_the_same_records_are_known_under_other_names(tmp_path, monkeypatch):
    folder = tmp_path / "banks"
    folder.mkdir()
    (folder / "a.csv").write_text("text,label\none,x\n")
    (folder / "b.csv").write_text("text,label\ntwo,y\n")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "other.csv").write_text("text,label\nthree,x\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = str(folder)
    for same in (f"{folder}/*.csv", str(tmp_path / "link"), "~/banks", f"{folder}/b.csv"):
        assert _same_records(source, same) == _same_records(same, source) == "the same data.source"
    for other in ("~/other.csv", "~/none.csv", "hub:banks", "memory:1"):
        assert not _same_records(source, other)
    assert "two tables count as the same records" in _same_records("memory:1", "memory:2")
    assert _same_records("memory:1", "memory:1") == "the same data.source"


@pytest.mark.parametrize("strategy", ["stack", "exact"])
def test_a_strategy_with_residuals_starts_from_what_the_earlier_run_computes(
    strategy, tiny_config, simulate_run, tmp_path, monkeypatch
):
    """From factors of scale 2, of another rank; and from factors that were saved with residuals."""
    plain = {"privacy.epsilon": float("inf"), "home.method": "none"}
    stepwise = {
        "federation.server-optimizer": "none",
        "federation.server-learning-rate": 1,
        "federation.strategy": strategy,
    }
    before = simulate_run(tiny_config(**plain, **{"run-dir": str(tmp_path / "fedavg")}))
    tiny_step = {"training.learning-rate": 1e-7, "federation.rounds": 1, "adapter.rank": 2}
    values = {**plain, **stepwise, **tiny_step}
    start = tmp_path / "fedavg"
    for number, rounds in enumerate((1, 0, 1)):  # of none, of a residual alone, of both
        place = tmp_path / f"run-{number}"
        config = tiny_config(
            **values
            | {"run-dir": str(place), "adapter.start": str(start), "federation.rounds": rounds}
        )
        found = start_adapter(config, trainable.load(config, records.load(config).labels))
        factors = found.layers().values()  # stack sends fresh ones: all that counts is the residual
        assert all(not layer.b.any() and layer.residual[1].any() for layer in factors)
        after = simulate_run(config)
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)
        measured = finished_run.evaluate(place, config.data.source)
        expected = finished_run.evaluate(tmp_path / "fedavg", config.data.source)
        assert measured["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        start = place
    saved = AdapterState.open(start / "adapter").rank
    assert saved > 2
    monkeypatch.setattr("server.start.RESIDUAL_RANK", saved - 1)
    values |= {"adapter.start": str(start)}
    after = simulate_run(tiny_config(**values | {"run-dir": str(tmp_path / "bounded")}))
    assert after["loss"] == pytest.approx(before["loss"], abs=0.05)  # and nobody refused


def test_an_institution_s_own_adapter_is_no_start_under_dp_on_the_same_records(
    tiny_config, simulate_run, tmp_path
):
    first, own = tmp_path / "first", tmp_path / "first" / "institutions" / "Alpha" / "own"
    secure = {"privacy.noise": "secure", "federation.rounds": 1, "home.steps": 2}
    before = tiny_config(**{**secure, "run-dir": str(first), "home.method": "interpolate"})
    simulate_run(before)
    (first / "config.toml").write_text(before.to_toml())
    made = trainable.load(before, records.load(before).labels)
    at_home = tmp_path / "state" / "home" / "first"  # what `fedlora home` writes
    shutil.copytree(own, at_home / "own")
    (at_home / "home.toml").write_text(before.to_toml())
    (at_home / "result.json").write_text(json.dumps({"run": "abc", "origins": []}))
    for start in (at_home / "own", own, own / ".." / "own"):
        following = before.replace({"adapter.start": str(start), "run-dir": str(tmp_path / "two")})
        with pytest.raises(InputError, match=r"an institution's own adapter of .*first, a run on"):
            start_adapter(following, made)
    following = following.replace({"adapter.start": str(at_home / "own")})
    assert origins(following) == [
        Origin(run="abc", source=name, private=False) for name in (source(before), ONE_INSTITUTION)
    ]
    # a deployed run knows no institution's file, so that whatever was made of one counts
    for file in (at_home / "home.toml", first / "config.toml"):
        file.write_text(before.replace({"data.source": "/srv/bank.csv"}).to_toml())
    values = {"data.source": INSTITUTIONS, "data.labels": list(made.labels), "data.institutions": 3}
    deployed = following.replace(values)
    for start in (at_home / "own", own):
        with pytest.raises(InputError, match="records of an institution, which this run may be on"):
            start_adapter(deployed.replace({"adapter.start": str(start)}), made)
    assert Origin(run="abc", source=ONE_INSTITUTION, private=False) in origins(deployed)
    released_by = Origin(run="abc", source=INSTITUTIONS, private=False)  # it is not here itself
    about = {"run": "abc", "origins": [released_by]}
    (at_home / "result.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="the run abc on records of institutions, which this run"):
        start_adapter(following, made)
    start_adapter(deployed.replace({"adapter.start": str(first)}), made)  # it may be public
    found = start_adapter(following.replace({"privacy.epsilon": float("inf")}), made)
    saved = AdapterState.open(own)
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_a_start_that_knows_rows_which_are_held_out_now_is_refused(
    tiny_config, simulate_run, tmp_path
):
    plain = {"privacy.epsilon": float("inf"), "federation.rounds": 1}
    first = tiny_config(**plain, **{"run-dir": str(tmp_path / "first")})
    simulate_run(first)
    (tmp_path / "first" / "config.toml").write_text(first.to_toml())
    made = trainable.load(first, records.load(first).labels)
    following = first.replace({"adapter.start": str(tmp_path / "first")})
    start_adapter(following, made)
    for key, value in (("seed", 9), ("data.test-fraction", 0.4)):
        with pytest.raises(InputError, match=f"another split \\({key} "):
            start_adapter(following.replace({key: value}), made)
    elsewhere = following.replace({"data.source": "package:edgartools", "seed": 9})
    start_adapter(elsewhere, made)
    measured = elsewhere.replace({"data.test-source": first.data.source})
    with pytest.raises(InputError, match=r"was trained on data\.test-source"):
        start_adapter(measured, made)
    apart = first.replace({"data.test-source": "package:edgartools"})
    (tmp_path / "first" / "config.toml").write_text(apart.to_toml())
    following = apart.replace({"adapter.start": str(tmp_path / "first"), "seed": 9})
    start_adapter(following, made)  # a source of its own decides, not the seed
    with pytest.raises(InputError, match=r"another split \(data.text "):
        start_adapter(following.replace({"data.text": "other"}), made)


@pytest.mark.parametrize("epsilon", [4.0, float("inf")])
def test_a_simulation_may_be_on_the_records_of_an_earlier_deployed_run(
    tiny_config, simulate_run, tmp_path, epsilon
):
    secure = {"privacy.noise": "secure", "federation.rounds": 1}
    first = tiny_config(**secure, **{"run-dir": str(tmp_path / "first")})
    simulate_run(first)
    made = trainable.load(first, records.load(first).labels)
    values = {"data.source": INSTITUTIONS, "data.labels": list(made.labels), "data.institutions": 3}
    values |= {"privacy.epsilon": epsilon}
    (tmp_path / "first" / "config.toml").write_text(first.replace(values).to_toml())
    following = first.replace({"adapter.start": str(tmp_path / "first")})
    hidden = {"federation.weighting": "uniform", "privacy.institution-epsilon": 8.0}
    for config in (following, following.replace(hidden)):
        if epsilon < float("inf") and config is following:
            start_adapter(config, made)
            continue
        with pytest.raises(InputError, match="records of institutions, which this run may be on"):
            start_adapter(config, made)
    start_adapter(following.replace({"privacy.epsilon": float("inf")}), made)


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        (
            [{"run": "gone", "source": "complaints.csv"}],
            "the run gone on a data.source of this name",
        ),
        ([{"run": "unknown", "source": "A"}], "the run unknown on records that nobody knows"),
        (None, "the run unknown on records that nobody knows"),
        ([{"run": "gone", "source": "public.csv"}], ""),
    ],
)
def test_a_released_adapter_says_what_its_run_goes_back_to(tiny_config, tmp_path, behind, said):
    config = tiny_config(**{"privacy.noise": "secure"})
    made = trainable.load(config, records.load(config).labels)
    made.start.save(tmp_path, made.model)
    known = [{**one, "private": False} for one in behind or ()]
    release = Release(
        run="abc",
        name="first",
        round=3,
        base=made.base.digest,
        origins=known,
        adapter=made.start,
    )
    values = {"data.source": INSTITUTIONS, "data.labels": list(made.labels)}
    released.describe(tmp_path, release, config.replace(values | {"data.institutions": 4}).flat())
    if behind is None:  # an earlier version wrote it
        content = json.loads((tmp_path / released.FILE).read_text())
        del content["origins"]
        (tmp_path / released.FILE).write_text(json.dumps(content))
    following = config.replace({"adapter.start": str(tmp_path)})
    if behind is not None:
        assert origins(following)[1:] == known
    if not said:
        start_adapter(following, made)
        return
    with pytest.raises(InputError, match=said):
        start_adapter(following, made)
    start_adapter(following.replace({"privacy.epsilon": float("inf")}), made)


@pytest.mark.parametrize("epsilon", [4.0, float("inf")])
def test_a_released_adapter_is_known_where_an_institution_keeps_it(tiny_config, tmp_path, epsilon):
    config = tiny_config(**{"privacy.noise": "secure"})
    made = trainable.load(config, records.load(config).labels)
    kept = tmp_path / "state" / "released" / "abc"
    kept.mkdir(parents=True)
    made.start.save(kept, made.model)
    released.describe(
        kept,
        Release(
            run="abc", name="first", round=3, base=made.base.digest, origins=[], adapter=made.start
        ),
        config.replace(
            {
                "data.source": "institutions",
                "data.labels": list(made.labels),
                "data.institutions": 4,
                "privacy.epsilon": epsilon,
            }
        ).flat(),
    )
    following = config.replace({"adapter.start": str(kept)})
    private = epsilon < float("inf")
    assert origins(following) == [Origin(run="abc", source="institutions", private=private)]
    if private:
        start_adapter(following, made)
        return
    with pytest.raises(InputError, match="the run first released what it goes back to"):
        start_adapter(following, made)
    start_adapter(following.replace({"privacy.epsilon": float("inf")}), made)


def test_a_start_under_dp_needs_the_ledgers_that_were_charged_for_it(
    tiny_config, simulate_run, tmp_path
):
    first = tiny_config(
        **{
            "run-dir": str(tmp_path / "first"),
            "privacy.noise": "secure",
            "privacy.max-epsilon": 20.0,
            "federation.rounds": 1,
        }
    )
    simulate_run(first)
    (tmp_path / "first" / "config.toml").write_text(first.to_toml())
    second = first.replace(
        {"run-dir": str(tmp_path / "second"), "adapter.start": str(tmp_path / "first")}
    )
    ledgers = tmp_path / "first" / "ledgers"
    made = trainable.load(first, records.load(first).labels)
    (tmp_path / "other").mkdir()
    for elsewhere in ("", str(tmp_path / "other"), str(tmp_path / "absent")):
        with pytest.raises(InputError, match=re.escape(f"set privacy.ledger to {ledgers}")):
            start_adapter(second.replace({"privacy.ledger": elsewhere}), made)
    same = second.replace({"privacy.ledger": str(ledgers)})
    simulate_run(same)
    stated = json.loads((tmp_path / "second" / "privacy.json").read_text())["institutions"]
    assert all(one["ledger_epsilon"] > 1.1 * one["epsilon"] for one in stated.values())
    both = at_most(max(one["ledger_epsilon"] for one in stated.values()))
    card = (tmp_path / "second" / "adapter" / "README.md").read_text()
    assert f"| largest epsilon of a ledger, all runs charged to it | {both} |" in card
    own_rounds = "What the start adapter reveals of the same records is not in"
    for run, said in (("first", False), ("second", True)):
        text = report.write(tmp_path / run).read_text(encoding="utf-8")
        assert (own_rounds in text) == said
    for change in (
        {"data.view": "pooled"},  # one new ledger, of all records
        {"data.partition": "iid", "data.institutions": 2},
    ):
        with pytest.raises(InputError, match="assigned to institutions in another way"):
            start_adapter(same.replace(change), made)
    (ledgers / "Beta.db").rename(tmp_path / "Beta.db")
    with pytest.raises(InputError, match=r"no ledger of Beta, which spent in .*first"):
        start_adapter(same, made)
    (tmp_path / "Beta.db").rename(ledgers / "Beta.db")
    start_adapter(same, made)
    ledgers.rename(tmp_path / "moved")  # what was spent is not known any more
    with pytest.raises(InputError, match=r"set privacy\.ledger to"):
        start_adapter(same, made)
