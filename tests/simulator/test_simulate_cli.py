"""The command: what it reads, what it refuses in words, what it finds."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
from sim_runs import PROFILE

from jmemserve.simulate import main
from jmemserve.simulator.cluster import SimCluster
from jmemserve.simulator.sessions import converse, read_sessions
from jmemserve.simulator.traces import read_calls, replay


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    path.write_text(PROFILE.to_json())
    return str(path)


SMALL = ["--requests", "30", "--prompt", "40", "--output-tokens", "8", "--max-num-seqs", "4", "--kv-tokens", "2048"]


def test_runs_are_compared_and_written(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    wishes = ["--cluster", "prefill+decode", "2xcolocated", "--policy", "cost,round_robin", "--caching", "none,full"]
    files = ["--output", str(out), "--plot", str(picture)]
    assert main(["--profile", profile, *SMALL, "--shared-prefix", "32", *wishes, *files]) == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 8 and len(capsys.readouterr().out.splitlines()) == 9
    assert {(row["mesh"], row["policy"], row["caching"]) for row in rows} >= {("2xcolocated", "round_robin", "none")}
    for row in rows:
        assert row["requests"] == 30 and 0 < row["ttft_p50"] <= row["ttft_p99"] < row["jct_p99"]
        assert (row["hit_rate"] > 0.5) == (row["caching"] == "full")
    assert picture.stat().st_size > 10_000


def test_the_cheapest_cluster_meets_the_goal_and_a_smaller_one_does_not(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    goal = ["--sweep", "16", "--ttft-p99", "0.1", "--tpot-p99", "0.02"]
    assert main(["--profile", profile, *SMALL, "--requests", "150", "--rate", "120", *goal, "--output", str(out)]) == 0
    rows = json.loads(out.read_text())
    best = rows[-1]
    assert best["meets_goal"] and best["ttft_p99"] <= 0.1 and best["tpot_p99"] <= 0.02
    fewer = [row for row in rows if row["devices"] < best["devices"]]
    assert fewer and not any(row["meets_goal"] for row in fewer)
    assert max(row["devices"] for row in fewer) == best["devices"] - 1
    assert f"the cheapest that meets the goal: {best['mesh']}" in capsys.readouterr().out
    assert main(["--profile", profile, *SMALL, "--rate", "1000", "--sweep", "1", "--ttft-p99", "0.001"]) == 2
    assert "1 instances do not meet the goal" in capsys.readouterr().err


def test_hardware_is_worked_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "config.json"
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    model.write_text(json.dumps(sizes | {"intermediate_size": 14336, "vocab_size": 128256}))
    out = tmp_path / "out.json"
    flags = ["--hardware", "h200", "--model", str(model), "--cluster", "colocated:2", "--output", str(out)]
    assert main([*flags, "--requests", "5", "--prompt", "1000"]) == 0
    (row,) = json.loads(out.read_text())
    assert "not measured" in row["profile"] and "2 x h200" in capsys.readouterr().err
    assert 0.01 < row["ttft_p50"] < 0.1, "an 8B model computes 1,000 tokens in some tens of milliseconds"
    assert main(["--hardware", "h200", "--model", str(tmp_path / "no")]) == 2
    assert main(["--hardware", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps(json.loads(model.read_text()) | {"num_local_experts": 8}))
    assert main(["--hardware", "h200", "--model", str(mixture)]) == 2
    assert "mixture of experts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "give --profile FILE"),
        (["--profile", "missing.json"], "--profile missing.json: No such file"),
        (["--profile", "decode={profile}"], "there is no --profile for colocated instances"),
        (["--profile", "{profile}", "--cluster", "3xprefil"], "'prefil' is no role"),
        (["--profile", "{profile}", "--cluster", "decode"], "nothing can prefill"),
        (["--profile", "{profile}", "--policy", "best"], "possible are cost"),
        (["--profile", "{profile}", "--trace", "missing.jsonl"], "--trace missing.jsonl: No such file"),
        (["--profile", "{profile}", "--sweep", "4"], "--sweep needs a goal"),
        (["--profile", "{profile}", "--block-size", "5"], "power of two"),
        (["--profile", "{profile}", "--plot", "picture.xyz"], "a picture ends in .png"),
        (["--profile", "{profile}", "--output", "/"], "cannot be written"),
        (["--profile", "{profile}", "--plot", "/nowhere/x.png"], "cannot be written"),
        (["--profile", "{bytes}"], "is not text"),
        (["--profile", "{free}", "--dram-tokens", "4096"], "calibrate with --host-memory-gb"),
    ],
)
def test_bad_input_is_refused_in_words(
    profile: str, tmp_path: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, free = tmp_path / "bytes.json", tmp_path / "free.json"
    odd.write_bytes(b"\xff\xfe\x00")
    free.write_text(dataclasses.replace(PROFILE, swap_call_s=0.0, swap_block_s=0.0).to_json())
    names = {"{profile}": profile, "{bytes}": str(odd), "{free}": str(free)}
    for name, path in names.items():
        flags = [flag.replace(name, path) for flag in flags]
    assert main(flags) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        *(["--rate", text] for text in ("0", "nan", "inf", "-1")),
        *(["--cores", text] for text in ("0", "-1", "nan")),
        ["--seed", "-1"],
        ["--dram-tokens", "-5"],
        ["--kv-tokens", "0"],
        ["--front-end-s", "-3"],
        ["--think-s", "nan"],
        ["--speed", "nan"],
        ["--sweep", "-4"],
        ["--requests", "1.5"],
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    profile: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--profile", profile, *flags])
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"argument {flags[0]}: " in said


def test_interrupted(profile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SimCluster, "run", interrupt)
    assert main(["--profile", profile, *SMALL]) == 130
    assert capsys.readouterr().err.endswith("cancelled\n")


def test_turns_that_were_never_sent_are_counted(profile: str, tmp_path: Path) -> None:
    """Who is refused does not come back with the rest of the conversation."""
    path, out = tmp_path / "talk.jsonl", tmp_path / "out.json"
    turns = [{"u": "a" * 400, "a": "b" * 100}] * 3
    path.write_text("\n".join(json.dumps({"turns": turns}) for _ in range(10)))
    flags = ["--trace", str(path), "--requests", "30", "--rate", "1000", "--max-queue", "2", "--output", str(out)]
    assert main(["--profile", profile, *flags]) == 0
    [row] = json.loads(out.read_text())
    assert row["refused"] > 0 and row["unsent"] > 0
    assert row["requests"] + row["refused"] + row["unsent"] == 30


def test_answers_of_one_token_have_no_time_between_tokens(profile: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    goal = ["--sweep", "2", "--tpot-p99", "0.5", "--output", str(out)]
    assert main(["--profile", profile, "--requests", "5", "--output-tokens", "1", "--prompt", "40", *goal]) == 0
    assert json.loads(out.read_text())[-1]["tpot_p99"] is None


def test_hashes_of_any_width_are_ids(profile: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [2**64 - 1, 2**63]}
    path.write_text(json.dumps(line))
    assert main(["--profile", profile, "--trace", str(path), "--requests", "3"]) == 0


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "has no lines"),
        ("{", "line 1: JSONDecodeError"),
        ('{"a": 1}', "neither of a hash trace"),
        (
            '{"timestamp": 0, "input_length": 5000, "output_length": 1, "hash_ids": [1]}',
            "line 1: ValueError: 1 hash ids",
        ),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": [1]}', "line 1: KeyError: 'output_length'"),
        ('{"turns": [{"u": "x"}]}', "line 1: KeyError: 'a'"),
        ('{"hash_ids": ' + "[" * 100_000, "line 1: RecursionError"),
        (
            '{"timestamp": NaN, "input_length": 5, "output_length": 1, "hash_ids": [1]}',
            "must be 0 or more",
        ),
        ('{"timestamp": 0, "input_length": Infinity, "output_length": 1, "hash_ids": [1]}', "OverflowError"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(
    profile: str, tmp_path: Path, text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text + "\n")
    assert main(["--profile", profile, "--trace", str(path)]) == 2
    assert sentence in capsys.readouterr().err


def calls_file(path: Path) -> Path:
    lines = [
        {
            "timestamp": 1000 * n,
            "input_length": 512 * 2 + 100,
            "output_length": 40,
            "hash_ids": [0, n // 2 * 10 + 1, n + 500],
        }
        for n in range(10)
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def test_a_hash_trace_keeps_what_its_prompts_share(tmp_path: Path) -> None:
    """Equal ids are equal tokens; a copy of the trace shares only what begins all prompts."""
    calls = read_calls(calls_file(tmp_path / "trace.jsonl.gz"))
    jobs = list(replay(calls, 20, speed=2.0, scale=4))
    prompts = [job.prompt() for _, job in jobs]
    assert [time for time, _ in jobs[:3]] == [0.0, 0.5, 1.0] and jobs[10][0] > jobs[9][0]
    assert {len(prompt) for prompt in prompts} == {281} and {job.output for _, job in jobs} == {10}

    def shared(one: list[int], other: list[int]) -> int:
        return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))

    assert shared(prompts[0], prompts[1]) == 256 and shared(prompts[1], prompts[2]) == 128
    assert shared(prompts[0], prompts[10]) == 128 and prompts[0] == replay_first(calls)


def replay_first(calls) -> list[int]:
    return next(replay(calls, 1, scale=4))[1].prompt()


def test_sessions_go_on_with_their_own_answers(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    chat = {"id": "a", "turns": [{"u": "x" * 42, "a": "y" * 84}, {"u": "z" * 21, "a": "w" * 42}]}
    questions = {"id": "b", "doc": "d" * 4200, "qa": [{"q": "x" * 42, "a": "y" * 42}, {"q": "z" * 84, "a": "w" * 42}]}
    path.write_text(json.dumps(chat) + "\n" + json.dumps(questions) + "\n")
    (_, first), (_, asked) = converse(read_sessions(path), 4, rate=1.0, think_s=2.0, seed=0)
    prompt = first.prompt()
    assert (len(prompt), first.output) == (10, 20) and first.after is not None
    following = first.after(prompt, [1, 2, 3])
    assert following is not None and following[0] > 0
    assert following[1].prompt()[:13] == [*prompt, 1, 2, 3] and len(following[1].prompt()) == 18
    assert following[1].after is None
    document = asked.prompt()
    assert len(document) == 1010 and asked.after is not None
    second = asked.after(document, [1, 2, 3])
    assert second is not None and second[1].prompt()[:1000] == document[:1000] and len(second[1].prompt()) == 1020
