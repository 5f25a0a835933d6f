"""Prefill and decode speed of transformers' continuous batching, in the terms of engine.py, on the same device.

    python benchmarks/peers/continuous_batching.py --config benchmarks/configs/llama-3.1-8b --dtype bfloat16 \
        --prompts 512 2048 --batches 1 16 64 --output results/peer.json

Needs PyTorch and transformers 5, and nothing of jmemserve: it may run with another Python. (It has a folder of its own
because transformers imports a package called kernels, and would find ours beside it.) Weights are random. A
token's time is when transformers says that it came.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

TIMEOUT_S = 600.0
CONFIGS = Path(__file__).parents[1] / "configs"


class Driver:
    """Sends prompts of random tokens to a manager, and says when each token came."""

    def __init__(self, manager, vocab_size: int):
        self._manager, self._vocab_size = manager, vocab_size
        self._random = torch.Generator().manual_seed(0)

    def run(self, count: int, length: int, new_tokens: int) -> tuple[float, list[list[float]]]:
        """(start, times of every token of every request)."""
        prompts = torch.randint(3, self._vocab_size, (count, length), generator=self._random).tolist()
        start = time.perf_counter()
        waiting = {
            self._manager.add_request(prompt, max_new_tokens=new_tokens, record_timestamps=True, eos_token_id=-1)
            for prompt in prompts
        }
        times = []
        while waiting:
            if time.perf_counter() - start > TIMEOUT_S:
                raise SystemExit(f"{len(waiting)} of {count} requests did not end within {TIMEOUT_S:.0f} s")
            result = self._manager.get_result(timeout=1)
            if result is None:
                continue
            if result.error:
                raise SystemExit(f"a request failed: {result.error}")
            waiting.discard(result.request_id)
            times.append(result.timestamps)
        return start, times

    def prefill_s(self, length: int) -> float:
        """To the first token of a prompt."""
        start, times = self.run(1, length, 1)
        return times[0][0] - start

    def decode_rate(self, batch: int, context: int, new_tokens: int) -> float:
        """Tokens per second while all of a batch decode."""
        _, times = self.run(batch, context, new_tokens)
        first, last = max(row[0] for row in times), min(row[-1] for row in times)
        return sum(sum(first < moment <= last for moment in row) for row in times) / (last - first)


def main() -> None:
    args = _parser().parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(args.config)
    torch.set_default_device(device)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    torch.set_default_device("cpu")
    greedy = GenerationConfig(do_sample=False, max_new_tokens=args.new_tokens, eos_token_id=-1, pad_token_id=0)
    rows = []
    with model.continuous_batching_context_manager(generation_config=greedy) as manager:
        driver = Driver(manager, config.vocab_size)
        driver.decode_rate(2, 32, 8)  # what is only slow the first time
        for length in args.prompts:
            seconds = statistics.median(driver.prefill_s(length) for _ in range(args.repeats))
            rows.append({"what": "prefill", "size": length, "tokens_per_s": length / seconds})
        for batch in args.batches:
            rates = [driver.decode_rate(batch, args.context, args.new_tokens) for _ in range(args.repeats)]
            rows.append({"what": "decode", "size": batch, "tokens_per_s": statistics.median(rates)})
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "model": args.config,
        "dtype": args.dtype,
    }
    print(json.dumps(about, indent=1))
    for row in rows:
        print(f"{row['what']:8} {row['size']:6} {row['tokens_per_s']:10.1f} tokens/s")
    if args.output:
        args.output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIGS / "llama-125m"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024], help="tokens of the prefill tests")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each decoding sequence")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens decoded per sequence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    return parser


if __name__ == "__main__":
    main()
