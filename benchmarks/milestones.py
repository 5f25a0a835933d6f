"""Conversations on prefill and decode instances, by how much of what was computed is kept (paper section 5.1).

    python benchmarks/milestones.py                                        all five, a process per instance, gRPC
    python benchmarks/milestones.py --how inprocess --repeats 1            without processes and gRPC
    python benchmarks/milestones.py --output results/milestones-cpu.json --plot results/milestones-cpu.png
    python benchmarks/milestones.py --data FOLDER                          lengths of recorded conversations

basic  PD-Basic: nothing is kept                           c2  PD-Caching-2: decode instances keep too
c1     PD-Caching-1: prefill instances keep prompts        c3  PD-Caching-3: and what they made goes back to prefill
cc     PD-CC: two colocated instances that keep everything; as many devices as the others have

In each turn of a conversation the prompt is all that was said before, the model's own answers and the user's new
words. Times are those of the client: TTFT to the first token, TPOT per token after it, JCT to the last;
"2nd" from the first token to the second, which has the hand-over from prefill to decode in it. Tokens computed
are those of the prompt that no cache had; tokens moved are counted by the pools, in whole blocks. The exit code is 1 if
an arrangement computes or moves something else than it should; how the times compare is only told.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine
from milestones_parts import tokens, workload
from milestones_parts.tokens import Counts, Measured
from milestones_parts.verdicts import Row, judge, medians
from milestones_parts.ways import ARRANGEMENTS, WAYS, Arrangement, Way
from tqdm import tqdm

from jmemserve.devices import arrange_cpu_devices
from jmemserve.server.flags import default_cache_dir

HERE = Path(__file__).parent
QUIET_S = 30.0  # for transfers to end after an answer
POLL_S = 0.005


class Player:
    """Holds conversations with one arrangement."""

    def __init__(self, arrangement: Arrangement, way: Way, args: argparse.Namespace):
        self.arrangement, self.way, self._args = arrangement, way, args
        self._alone = args.clients == 1

    def play(self, sessions: list[workload.Session], repeat: int, bar: tqdm) -> tuple[list[Measured], Counts]:
        """All sessions, from empty caches; what each turn cost, and what the pools counted meanwhile."""
        self.way.reset()
        before, measured = self._count(), []
        numbers, lock = itertools.count(), threading.Lock()

        def client() -> None:
            while (number := next(numbers)) < len(sessions):
                own = self._converse(sessions[number], repeat, number)
                with lock:
                    measured.extend(own)
                    bar.update(1)

        with ThreadPoolExecutor(self._args.clients) as pool:
            for future in [pool.submit(client) for _ in range(self._args.clients)]:
                future.result()
        return measured, self._quiet() - before

    def _converse(self, session: workload.Session, repeat: int, number: int) -> list[Measured]:
        said: tuple[int, ...] = ()
        measured: list[Measured] = []
        last_prompt = last_answer = 0
        before = self._count() if self._alone else Counts()
        for place, turn in enumerate(session, 1):
            prompt = said + turn.user
            answer = self.way.ask(prompt, turn.answer)
            if len(answer.tokens) != turn.answer:
                raise SystemExit(f"an answer has {len(answer.tokens)} tokens, not {turn.answer}")
            one = Measured(
                self.arrangement.name,
                repeat,
                number,
                place,
                len(turn.user),
                turn.answer,
                len(prompt),
                last_prompt,
                last_answer,
                ttft_ms=answer.first_s * 1e3,
                tpot_ms=(answer.last_s - answer.first_s) / max(1, turn.answer - 1) * 1e3,
                jct_ms=answer.last_s * 1e3,
                second_ms=(answer.second_s - answer.first_s) * 1e3,
                computed=len(prompt) - answer.cached,
            )
            if self._alone:
                after = self._quiet()
                one.forward, one.back = (after - before).forward, (after - before).back
                before = after
            time.sleep(self._args.think)
            measured.append(one)
            said, last_prompt, last_answer = prompt + tuple(answer.tokens), len(prompt), turn.answer
        return measured

    def _count(self) -> Counts:
        return tokens.count(self.way.pools(), self._args.block_size)

    def _quiet(self) -> Counts:
        """The counts once no transfer is under way: what goes back has landed."""
        limit = time.monotonic() + QUIET_S
        while tokens.under_way(pools := self.way.pools()):
            if time.monotonic() > limit:
                raise SystemExit(f"transfers are under way {QUIET_S:g} s after the last answer: {pools}")
            time.sleep(POLL_S)
        return tokens.count(pools, self._args.block_size)


def run(args: argparse.Namespace, lengths: list[workload.Lengths]) -> tuple[list[Measured], list[str]]:
    """Every turn of every arrangement, and what does not add up."""
    chosen = [ARRANGEMENTS[name] for name in dict.fromkeys(args.arrangements)]
    groups = [[arrangement] for arrangement in chosen] if args.one_at_a_time else [chosen]
    measured: list[Measured] = []
    wrong: list[str] = []
    bar = tqdm(total=len(chosen) * args.repeats * len(lengths), unit="session")
    for group in groups:
        with contextlib.ExitStack() as running:
            players = list(start(group, args, lengths, running, bar))
            for repeat in range(args.repeats):
                turned = repeat % len(players)
                for player in players[turned:] + players[:turned]:  # nobody is always the first or the last
                    bar.set_description(f"{player.arrangement.name}, repeat {repeat + 1}")
                    sessions = workload.fill(lengths, player.way.vocab_size, f"{args.seed} {repeat}")
                    found, total = player.play(sessions, repeat, bar)
                    measured += found
                    wrong += tokens.violations(player.arrangement, found, total, args.block_size)
    bar.close()
    order = [arrangement.name for arrangement in chosen]
    return sorted(measured, key=lambda one: order.index(one.arrangement)), wrong


def start(
    group: list[Arrangement],
    args: argparse.Namespace,
    lengths: list[workload.Lengths],
    running: contextlib.ExitStack,
    bar: tqdm,
) -> Iterable[Player]:
    """Start the arrangements, one after the other; each holds a conversation that does not count."""
    logs = args.logs or Path(running.enter_context(tempfile.TemporaryDirectory(prefix="milestones-")))
    logs.mkdir(parents=True, exist_ok=True)
    longest = max(sum(user + answer for user, answer in session) for session in lengths)
    room = args.block_size * len(lengths[0])
    engine = {
        "model": str(args.model),
        "load_format": args.load_format or ("auto" if str(args.model) == "demo" else "dummy"),
        "dtype": args.dtype,
        "block_size": str(args.block_size),
        "max_num_seqs": str(max(4, args.clients)),
        "max_num_batched_tokens": "512",
        "max_model_len": str(longest + 1),
        "kv_cache_tokens": str(max(4096, (len(lengths) + 1) * (longest + room))),  # for all: nothing is dropped
        "compilation_cache_dir": args.compilation_cache_dir,
    }
    for arrangement in group:
        bar.set_description(f"{arrangement.name} starts")
        log = logs / f"{arrangement.name}.log"
        player = Player(arrangement, running.enter_context(WAYS[args.how](arrangement, engine, log)), args)
        silent = tqdm(disable=True)
        player.play(workload.fill(lengths[:1], player.way.vocab_size, "warm up"), -1, silent)
        yield player


def print_table(rows: list[Row]) -> None:
    """The medians, an arrangement after the other."""
    head = ("turn", "prompt", "TTFT ms", "JCT ms", "TPOT ms", "2nd ms", "computed", "P to D", "D to P")
    names = ("turn", "prompt", "ttft_ms", "jct_ms", "tpot_ms", "second_ms", "computed", "forward", "back")
    print(f"{'':13}" + "".join(f"{text:>10}" for text in head))
    last = None
    for row in rows:
        cells = (
            "-" if (value := row[name]) is None else f"{value:.1f}" if "_ms" in name else f"{value:g}" for name in names
        )
        print(
            f"{row['arrangement'] if row['arrangement'] != last else '':13}" + "".join(f"{cell:>10}" for cell in cells)
        )
        last = row["arrangement"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrangements", nargs="+", choices=list(ARRANGEMENTS), default=list(ARRANGEMENTS))
    parser.add_argument("--how", choices=list(WAYS), default="processes", help="default: %(default)s")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--user-tokens", type=int, default=48, help="that the user says in each turn")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--data", type=Path, help="folder with conversations as JSON, whose lengths are taken instead")
    parser.add_argument("--divide", type=int, default=8, help="those lengths by this (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=256, help="tokens of one recorded message, after dividing")
    parser.add_argument(
        "--clients", type=int, default=1, help="sessions held at once; with several, moves are only summed"
    )
    parser.add_argument("--think", type=float, help="seconds between turns (default: 0; with several clients 0.5)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="start an arrangement when the one before has ended"
    )
    parser.add_argument("--model", default=HERE / "configs" / "llama-28m", help="a folder, or demo")
    parser.add_argument("--load-format", help="default: dummy, random weights; for demo: auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--compilation-cache-dir", default=default_cache_dir(), help="default: the server's")
    parser.add_argument("--flat", type=float, default=1.35, help="TTFT of the last turn over the first that is flat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG")
    args = parser.parse_args()
    for name in ("sessions", "turns", "user_tokens", "clients", "repeats", "divide"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.answer_tokens < 2:
        parser.error("--answer-tokens must be at least 2")
    if args.think is None:
        args.think = 0.0 if args.clients == 1 else 0.5
    if args.data:
        lengths = workload.recorded(args.data, args.sessions, args.turns, args.divide, args.longest, args.seed)
    else:
        lengths = workload.alike(args.sessions, args.turns, args.user_tokens, args.answer_tokens)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are ended then too
    arrange_cpu_devices(2)
    about = machine.about()
    for key, value in about.items():
        print(f"{key:>10}: {value}")
    began = time.monotonic()
    measured, wrong = run(args, lengths)
    seconds = time.monotonic() - began
    rows = medians(measured)
    print(f"\nmedians over {args.sessions} sessions and {args.repeats} repeats; {seconds:.0f} s in all")
    print_table(rows)
    verdicts = judge(rows, args.flat)
    print()
    for verdict in verdicts:
        print(verdict)
    for text in wrong[:20]:
        print(f"WRONG: {text}")
    good = f"as they should be in {len(measured)} turns"
    print(f"tokens computed and moved: {f'{len(wrong)} faults' if wrong else good}")
    if args.output:
        result = {
            **about,
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "seconds": seconds,
            "rows": rows,
            "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
            "wrong": wrong,
            "turns": [dataclasses.asdict(one) for one in measured],
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        try:
            from milestones_parts import plots
        except ImportError:
            raise SystemExit("--plot needs matplotlib: pip install 'jmemserve[bench]'") from None
        model = Path(args.model).name
        plots.draw(rows, args.plot, f"{model}, {args.how}, {about['cpu']}, {about['device']}, {about['jmemserve']}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
