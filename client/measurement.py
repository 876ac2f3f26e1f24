"""An institution's measurements on its held-out rows."""

from client import checks, home
from client.institution import Institution
from fedlora import processors
from fedlora.data import records
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
from fedlora.privacy.streams import RandomSource
from fedlora.runs import model_card
from fedlora.wire.messages import EvaluateOrder, Evaluation


def evaluate(institution: Institution, order: EvaluateOrder) -> Evaluation:
    """Evaluate the institution's own adapter on its held-out rows; save it on request.

    This is the experimenter's measurement on rows that are set aside, in simulations only.

    Raises:
        Refusal: As `released`.
    """
    config = institution.config
    with processors.threads(config.engine.threads):
        adapter = released(institution, order)  # first: a deployed institution refuses there
        work = institution.load()
        adapter.load_into(work.model)
        if order.save:
            place = institution.directory / "adapter"
            adapter.save(place, work.model)
            said = f"# An institution's adapter\n\n{model_card.KEPT_PART}"
            model_card.write_own(place, said, config, work)
        shard = records.load(config).held_out(institution.index)
        metrics = work.task.evaluate(work.model, shard, work.labels) if len(shard) else {}
    return Evaluation(institution=institution.name, metrics=metrics)


def released(institution: Institution, order: EvaluateOrder) -> AdapterState:
    """The adapter that the run released to an institution: the global one and local parts.

    Raises:
        Refusal: ``metrics-not-allowed`` outside of simulations; if the adapter does not fit;
            ``kept-part-unreadable``.
    """
    if not institution.simulated:
        raise Refusal("metrics-not-allowed", "the server asks for metrics of held-out rows")
    checks.check_adapter(order.adapter, institution.load().start, institution.config)
    return institution.with_local_parts(order)


def compare_at_home(institution: Institution, shared: AdapterState) -> Evaluation:
    """Train an institution's own models, and answer its held-out rows with all three.

    The own model is saved into ``own/``, with its card.

    Args:
        institution: The institution.
        shared: The adapter that the run released to it.
    """
    config = institution.config
    with processors.threads(config.engine.threads):
        work = institution.load()
        models = home.train(
            work,
            institution.records(),
            shared,
            RandomSource.seeded("home", config.seed, institution.name),
            steps=config.home.steps,
            physical_batch=config.training.physical_batch,
        )
        models.own.save(institution.directory / "own", work.model)
        model_card.write_own(institution.directory / "own", home.CARD, config, work)
        shard = records.load(config).held_out(institution.index)
        predicted: dict[str, list[int]] = {}
        for name, adapter in (("alone", models.alone), ("shared", shared), ("own", models.own)):
            adapter.load_into(work.model)
            answers = work.task.predict(work.model, shard, work.labels)[0] if len(shard) else []
            predicted[name] = [work.labels.index(answer) for answer in answers]
    return Evaluation(institution=institution.name, metrics={**predicted, **models.figures()})
