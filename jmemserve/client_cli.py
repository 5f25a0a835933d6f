"""The command line of ``python -m jmemserve.client``: text to stdout while it is made, numbers to stderr."""

import argparse
import dataclasses
import enum
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from jmemserve.client import DEFAULT_ADDRESS, Client, Prompt
from jmemserve.errors import InvalidRequest, JmemserveError
from jmemserve.server.messages import Delta, Finished, Message, Output, fold
from jmemserve.types import ClusterReport, FinishReason, MemberReport, SamplingParams

INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended
_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "0 is greedy"),
    ("top_k", int, "only the k likeliest tokens"),
    ("top_p", float, "only the likeliest tokens of this probability together"),
    ("min_p", float, "only tokens at least this share as likely as the likeliest"),
    ("repetition_penalty", float, "above 1: fewer repetitions"),
    ("presence_penalty", float, "above 0: fewer repetitions"),
    ("frequency_penalty", float, "above 0: fewer repetitions"),
    ("seed", int, "same seed, same output"),
    ("max_tokens", int, "the most tokens to make"),
    ("min_tokens", int, "the fewest tokens to make"),
    ("logprobs", int, "log probabilities, with this many alternatives (only seen with --json)"),
    ("n", int, "how many outputs"),
)


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0; 1 after an error, with a sentence; 130 after Ctrl-C, which cancels the request."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.system is not None and arguments.chat is None:
        parser.error("--system is the system message of a chat; give --chat too")
    try:
        with Client(arguments.address) as client:
            return _control(client, arguments) if _is_control(arguments) else _generate(client, arguments)
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left; closing the client has cancelled the request
        sys.stderr.close()
        return 1
    except JmemserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m jmemserve.client", description=__doc__, allow_abbrev=False)
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="HOST:PORT of the server (default: %(default)s)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="continue this text")
    what.add_argument("--tokens", metavar="IDS", help="continue these token ids, separated by commas or spaces")
    what.add_argument("--file", metavar="PATH", help="continue the text in this file; - is stdin")
    what.add_argument("--chat", metavar="TEXT", help="answer this message, by the model's chat template")
    what.add_argument("--abort", metavar="ID", help="end the request with this id")
    what.add_argument("--info", action="store_true", help="describe the server and its model")
    what.add_argument("--load", action="store_true", help="show the load of every instance")
    what.add_argument("--cluster", action="store_true", help="show who belongs to the cluster; with --json as JSON")
    what.add_argument("--profile", metavar="INSTANCE", help="print what work costs there, as JSON for the simulator")
    what.add_argument("--set-role", metavar="INSTANCE=ROLE", help="let an instance prefer something else")
    what.add_argument("--move", metavar="ID[=INSTANCE]", help="let a running request go on at another instance")
    what.add_argument("--drain", metavar="INSTANCE", help="let an instance finish and leave")
    what.add_argument("--health", action="store_true", help="say whether requests are accepted; exit code 1 if not")
    parser.add_argument("--system", metavar="TEXT", help="system message before --chat")
    for name, kind, text in _NUMBERS:
        parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X" if kind is float else "N", help=text)
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end at this text; repeatable")
    parser.add_argument("--stop-token-ids", metavar="IDS", default="", help="end at one of these tokens")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    parser.add_argument("--request-id", metavar="ID", default="", help="id for --abort and the server's log")
    parser.add_argument("--cache-salt", metavar="TEXT", default="", help="share cached prefixes only within this salt")
    parser.add_argument("--session", metavar="ID", default="", help="serve it where the session's other requests were")
    parser.add_argument("--tenant", metavar="NAME", default="", help="who asks: tenants that wait are served fairly")
    parser.add_argument("--priority", type=int, metavar="N", default=0, help="higher goes first (default: 0)")
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after this many seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object when all is done")
    return parser


def _is_control(arguments: argparse.Namespace) -> bool:
    given = vars(arguments)
    return any(
        given[name] for name in ("abort", "info", "load", "health", "cluster", "profile", "set_role", "move", "drain")
    )


def _control(client: Client, arguments: argparse.Namespace) -> int:
    if arguments.abort:
        print("aborted" if client.abort(arguments.abort) else "not in flight")
        return 0
    if arguments.health:
        serving = client.is_serving()
        print("SERVING" if serving else "NOT_SERVING")
        return 0 if serving else 1
    if arguments.load:
        print(json.dumps([dataclasses.asdict(load) for load in client.loads()], indent=2))
        return 0
    if arguments.cluster:
        report = client.cluster()
        print(json.dumps(dataclasses.asdict(report), indent=2) if arguments.json else cluster_table(report))
        return 0
    if arguments.profile:
        return _profile(client, arguments.profile)
    if arguments.set_role:
        instance, _, role = arguments.set_role.partition("=")
        client.set_role(instance, role)
        print(f"{instance} was asked to be {role}; --cluster shows when it is")
        return 0
    if arguments.move:
        request_id, _, instance = arguments.move.partition("=")
        print(f"{request_id} goes on at {', '.join(client.move(request_id, instance))}")
        return 0
    if arguments.drain:
        client.drain_instance(arguments.drain)
        print(f"{arguments.drain} finishes and leaves; --cluster shows when it has")
        return 0
    info = {"server": json_format.MessageToDict(client.server_info(), preserving_proto_field_name=True)}
    if info["server"].get("state") != "SERVER_STATE_LOADING":
        info["model"] = json_format.MessageToDict(client.model_info(), preserving_proto_field_name=True)
    print(json.dumps(info, indent=2))
    return 0


def _profile(client: Client, instance: str) -> int:
    alive = {member.name: member for member in client.cluster().members if member.state not in ("dead", "left")}
    if instance not in alive:
        raise InvalidRequest(f"there is no instance {instance!r}; those that there are: {', '.join(alive) or 'none'}")
    if not alive[instance].profile:
        raise InvalidRequest(f"{instance} has measured nothing: start it without --calibrate-s 0 and --warmup none")
    print(alive[instance].profile)
    return 0


def cluster_table(report: ClusterReport) -> str:
    """The cluster as a table, one line per instance, those that are gone first."""
    head = (
        "instance",
        "role",
        "state",
        "for",
        "heard",
        "running",
        "waiting",
        "blocks",
        "hits",
        "error",
        "host",
        "place",
        "peers",
    )
    rows = [head, *(_member_row(member) for member in report.members)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    reasons = [f"{member.name} is dead: {member.reason}" for member in report.members if member.reason]
    counts = (
        f"{report.requests} requests in flight; since the start {report.retries} went on elsewhere after a loss, "
        f"{report.moves} were moved, {report.failed} failed"
    )
    prompts = max(1, report.prompt_tokens)
    trees = (
        f"of {report.prompt_tokens} prompt tokens {report.cached_tokens} were cached, {report.predicted_tokens} "
        f"predicted (wrong: {100 * (report.over_tokens + report.under_tokens) / prompts:.1f}%); the router knows "
        f"{report.tree_blocks} blocks, asked for {report.tree_renewals} snapshots and for {report.pulls} pulls"
    )
    return "\n".join([*lines, *reasons, counts, trees])


def _member_row(member: MemberReport) -> tuple[str, ...]:
    load = member.load
    numbers = ("",) * 6
    if load is not None and member.state not in ("dead", "left"):
        used = load.total_blocks - load.free_blocks
        hits = f"{100 * load.prefix_hits / load.prefix_queries:.0f}%" if load.prefix_queries else "-"
        error = f"{100 * load.cost_error:.1f}%" if load.cost_error else "-"  # of the predicted time of steps
        times = load.host
        busy = times.plan_s + times.arrays_s + times.dispatch_s + times.commit_s  # of the host, per step
        host = f"{1e6 * busy:.0f} us" if busy else "-"
        numbers = str(load.running), str(load.waiting), f"{used}/{load.total_blocks}", hits, error, host
    peers = ", ".join(f"{name} by {way}" for name, way in member.peers)
    ages = f"{member.since_s:.0f} s", f"{member.heard_s:.1f} s"
    return member.name, member.role, member.state, *ages, *numbers, member.place, peers


def _generate(client: Client, arguments: argparse.Namespace) -> int:
    params = _params(arguments)
    live = not arguments.json and params.n == 1
    start = time.monotonic()
    times: list[float] = []  # when each message came
    messages: list[Message] = []
    stream = client.stream(
        _prompt(arguments),
        params,
        request_id=arguments.request_id,
        cache_salt=arguments.cache_salt,
        session=arguments.session,
        tenant=arguments.tenant,
        priority=arguments.priority,
        timeout_s=arguments.timeout,
    )
    for message in stream:
        times.append(time.monotonic() - start)
        messages.append(message)
        if live and isinstance(message, Delta):
            # Without a tokenizer there is no text to show.
            print(message.text or _ids_if_no_text(messages), end="", flush=True)
    outputs = fold(messages)
    if arguments.json:
        print(json.dumps({"outputs": [_plain(dataclasses.asdict(output)) for output in outputs]}, ensure_ascii=False))
    elif live:
        print()
    else:
        for output in outputs:
            print(f"--- {output.index}\n{output.text or _ids(output.tokens)}")
    print(_summary(outputs, messages, times), file=sys.stderr)
    errors = [output.error for output in outputs if output.error is not None]
    if errors:
        raise errors[0]
    return 0 if all(output.finish in (FinishReason.STOP, FinishReason.LENGTH) for output in outputs) else 1


def _prompt(arguments: argparse.Namespace) -> Prompt:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.tokens is not None:
        return _parse_ids("--tokens", arguments.tokens)
    if arguments.chat is not None:
        system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        return [*system, {"role": "user", "content": arguments.chat}]
    try:
        return sys.stdin.read() if arguments.file == "-" else Path(arguments.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--file {arguments.file} cannot be read: {error}") from None


def _params(arguments: argparse.Namespace) -> SamplingParams:
    values = {name: value for name, _, _ in _NUMBERS if (value := getattr(arguments, name)) is not None}
    stop_ids = tuple(_parse_ids("--stop-token-ids", arguments.stop_token_ids))
    return SamplingParams(
        stop=tuple(arguments.stop), stop_token_ids=stop_ids, ignore_eos=arguments.ignore_eos, **values
    )


def _parse_ids(flag: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidRequest(f"{flag} takes whole numbers, separated by commas or spaces, not {text!r}") from None


def _ids_if_no_text(messages: list[Message]) -> str:
    """The last delta's ids, if no delta has ever had text."""
    deltas = [message for message in messages if isinstance(message, Delta)]
    return "" if any(delta.text for delta in deltas) else _ids(deltas[-1].tokens) + " "


def _ids(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def _summary(outputs: list[Output], messages: list[Message], times: list[float]) -> str:
    """One line: why it ended, TTFT, TPOT (as seen here), tokens, and how many of the prompt were cached."""
    first = next((at for at, message in zip(times, messages, strict=True) if isinstance(message, Delta)), None)
    tokens = sum(output.usage.completion_tokens for output in outputs)
    longest = max((output.usage.completion_tokens for output in outputs), default=0)
    ends = ", ".join(message.finish.value for message in messages if isinstance(message, Finished))
    parts = [f"[{ends or 'no output'}"]
    if first is not None:
        parts.append(f"TTFT {first * 1000:.1f} ms")
        if longest > 1:
            parts.append(f"TPOT {(times[-1] - first) / (longest - 1) * 1000:.2f} ms")
    if outputs:
        usage = outputs[0].usage
        parts.append(f"{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached, {tokens} new")
    return " | ".join(parts) + "]"


def _plain(value: Any) -> Any:
    """JSON's own types only."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Exception) else value
