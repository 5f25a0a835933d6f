"""Plan a cluster without having it: the real schedulers on virtual time, with modelled instances.

python -m jmemserve.simulate --profile profile.json --cluster prefill+decode --rate 4 --prompt 512 --output-tokens 64
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jmemserve.config import Caching, Role, parse_mesh
from jmemserve.errors import ConfigError, JmemserveError
from jmemserve.scheduler.cost_model import Profile
from jmemserve.simulator.cluster import Setting, SimCluster
from jmemserve.simulator.instance import Limits
from jmemserve.simulator.load import poisson
from jmemserve.simulator.report import summary, table


def read_profile(path: str) -> Profile:
    try:
        return Profile.from_json(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--profile {path}: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--cluster", default="colocated")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shared-prefix", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output")
    args = parser.parse_args(arguments)
    try:
        profile = read_profile(args.profile)
        load = poisson(args.requests, args.rate, args.prompt, args.output_tokens, args.shared_prefix, args.seed)
        setting = Setting(parse_mesh(args.cluster), dict.fromkeys(Role, profile), Limits(caching=Caching.FULL))
        began = time.monotonic()
        with tqdm(total=args.requests, unit=" requests", file=sys.stderr) as bar:
            cluster = SimCluster(setting, bar.update)
            cluster.run(load)
        row = summary(cluster) | {"wall_s": time.monotonic() - began}
    except JmemserveError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    print(table([row]))
    if args.output:
        Path(args.output).write_text(json.dumps([row], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
