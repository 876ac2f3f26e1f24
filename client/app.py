"""The Flower ClientApp of an institution: unpack, call, pack. Errors leave as codes."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedlora
from client import institution
from fedlora import config as configuration
from fedlora import trainable, wire
from fedlora.errors import InputError, Refusal

log = logging.getLogger("fedlora.client")
app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Who this institution is, and whether the whole run fits its budget."""
    return _guarded(message, context, _hello)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    return _guarded(message, context, _train)


def _hello(config: configuration.RunConfig, content: RecordDict, index: int) -> RecordDict:
    query = wire.unpack_query(content)
    who = institution.locate(config, index)
    fits = True
    if config.privacy.enabled:
        shard = trainable.records(config).train(index)
        plan = institution.budget(config, shard.num_units, query.participations)
        with institution.open_ledger(who, config, shard, create=query.first) as ledger:
            fits = query.run in ledger.runs() or institution.fits(ledger, plan)
    return wire.pack_hello(wire.Hello(institution=who.name, version=fedlora.__version__, fits=fits))


def _train(config: configuration.RunConfig, content: RecordDict, index: int) -> RecordDict:
    order = wire.unpack_order(content)
    who = institution.locate(config, index)
    with _threads(config.engine.threads):
        return wire.pack_update(institution.answer(who, order, config))


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
    work: Callable[[configuration.RunConfig, RecordDict, int], RecordDict],
) -> Message:
    """Run ``work``; what goes wrong leaves as a code, the rest goes to this institution's log."""
    index = int(context.node_config.get("partition-id", -1))
    try:
        _only_in_simulation(context)
        config = configuration.from_context(context.run_config, context.run_id)
        reply = work(config, message.content, index)
    except Refusal as refusal:
        log.warning("institution %d refused: %s", index, refusal)
        # one code for all guards: which one tripped may depend on a record
        code = "guard" if refusal.code.startswith("guard-") else refusal.code
        reply = wire.pack_refusal(code)
    except InputError as error:
        log.error("institution %d cannot follow this configuration: %s", index, error)
        reply = wire.pack_refusal("bad-configuration")
    except Exception:
        log.exception("institution %d failed", index)
        reply = wire.pack_refusal("failed")
    return Message(reply, reply_to=message)
