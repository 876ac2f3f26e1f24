"""The Flower ClientApp of an institution: unpack, call, pack. Errors leave as codes."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedlora
from client import institution
from fedlora import config as configuration
from fedlora import trainable, wire
from fedlora.adapters import AdapterState
from fedlora.errors import InputError, Refusal

log = logging.getLogger("fedlora.client")
T = TypeVar("T")


class InstitutionApp(ClientApp):
    """A ClientApp that can also answer for several institutions of a simulation at once."""

    def together(self, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The replies to train messages, each the very one that it would get by itself.

        Institutions that follow equal orders of one DP step train in shared passes: each has its
        own records, ledger, sampling, clipped sum and noise, and what is shared is the base model's
        arithmetic. The others train one by one.
        """
        replies: list[RecordDict | None] = []
        charged: dict[int, institution.ChargedRound] = {}

        def begin(
            config: configuration.RunConfig, content: RecordDict, index: int
        ) -> RecordDict | None:
            order = wire.unpack_order(content)
            if not config.privacy.enabled or config.training.local_steps > 1 or order.kept:
                return _train(config, content, index)
            who = institution.locate(config, index)
            if any(other.institution == who for other in charged.values()):
                return None  # the same order twice: the second gets the answer to the first
            started = institution.charge(who, institution.accept(who, order, config), config)
            if isinstance(started, wire.ClientUpdate):
                return wire.pack_update(started)
            ledgers.enter_context(started.ledger)
            charged[len(replies)] = started
            return None

        with contextlib.ExitStack() as ledgers:
            for message, context in calls:
                replies.append(_guarded(message, context, begin))
            for number, adapter in _trained(charged).items():
                message, context = calls[number]

                def end(
                    *_: object, number: int = number, adapter: AdapterState = adapter
                ) -> RecordDict:
                    return wire.pack_update(institution.release(charged[number], adapter))

                replies[number] = _guarded(message, context, end)
        # What is left trains by itself; if it was charged, as the same release under the same key.
        return [
            Message(
                _guarded(message, context, _train) if reply is None else reply, reply_to=message
            )
            for reply, (message, context) in zip(replies, calls, strict=True)
        ]


app = InstitutionApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Who this institution is, and whether the whole run fits its budget."""
    return Message(_guarded(message, context, _hello), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    return Message(_guarded(message, context, _train), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Metrics of the institution's own adapter, in a simulation."""
    return Message(_guarded(message, context, _evaluate), reply_to=message)


def _hello(config: configuration.RunConfig, content: RecordDict, index: int) -> RecordDict:
    query = wire.unpack_query(content)
    who = institution.locate(config, index)
    fits = True
    if config.privacy.enabled:
        shard = trainable.records(config).train(index)
        plan = institution.budget(config, shard.num_units, query.participations)
        with institution.open_ledger(who, config, shard, create=query.first) as ledger:
            fits = query.run in ledger.runs() or institution.fits(ledger, plan)
    return wire.pack_hello(
        wire.Hello(
            institution=who.name,
            version=fedlora.__version__,
            fits=fits,
            rank=institution.ranks(config)[index],
        )
    )


def _train(config: configuration.RunConfig, content: RecordDict, index: int) -> RecordDict:
    order = wire.unpack_order(content)
    who = institution.locate(config, index)
    with _threads(config.engine.threads):
        return wire.pack_update(institution.answer(who, order, config))


def _evaluate(config: configuration.RunConfig, content: RecordDict, index: int) -> RecordDict:
    order = wire.unpack_evaluate(content)
    who = institution.locate(config, index)
    with _threads(config.engine.threads):
        return wire.pack_evaluation(institution.evaluate(who, order, config))


def _trained(charged: Mapping[int, institution.ChargedRound]) -> dict[int, AdapterState]:
    """The trained adapters of the rounds that could be trained, those of equal orders at once."""
    cohorts: dict[str, list[int]] = {}
    for number, started in charged.items():
        cohorts.setdefault(started.digest, []).append(number)
    found: dict[int, AdapterState] = {}
    for numbers in cohorts.values():
        cohort = [charged[number] for number in numbers]
        try:
            with _threads(cohort[0].config.engine.threads):
                trained = institution.train_charged(cohort)
        except Exception:  # whose it is shows when each trains by itself
            log.exception("training %d institutions together failed", len(cohort))
            continue
        found |= zip(numbers, trained, strict=True)
    return found


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums in floating point follow the number of threads: it is the same in every engine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _only_in_simulation(context: Context) -> None:
    """Refuse to work for a server on real data: here the server's configuration decides everything.

    In a simulation the experimenter is every institution. Elsewhere an institution must decide for
    itself where its records and its ledger are, and that DP stays on; that needs settings of its
    own, which this version does not read. What tells a simulation is local: our inline engine says
    so to the app, and Ray, ours or Flower's, runs it in one of its workers.
    """
    ray = sys.modules.get("ray")
    if not (context.node_config.get("simulation") is True or (ray and ray.is_initialized())):
        raise Refusal(
            "not-a-simulation",
            "this institution has no local settings that keep its data, ledger and budget out of "
            "the server's reach; only simulations are served",
        )


def _guarded(
    message: Message,
    context: Context,
    work: Callable[[configuration.RunConfig, RecordDict, int], T],
) -> T | RecordDict:
    """What ``work`` gives; an error leaves as a code, its text goes to this institution's log."""
    index = int(context.node_config.get("partition-id", -1))
    try:
        _only_in_simulation(context)
        config = configuration.from_context(context.run_config, context.run_id)
        return work(config, message.content, index)
    except Refusal as refusal:
        log.warning("institution %d refused: %s", index, refusal)
        # one code for all guards: which one tripped may depend on a record
        code = "guard" if refusal.code.startswith("guard-") else refusal.code
        return wire.pack_refusal(code)
    except InputError as error:
        log.error("institution %d cannot follow this configuration: %s", index, error)
        return wire.pack_refusal("bad-configuration")
    except Exception:
        log.exception("institution %d failed", index)
        return wire.pack_refusal("failed")
