"""``python -m jmemserve.poolstat`` against a real server."""

import asyncio
import dataclasses
import json

import pytest
from conftest import serving

from jmemserve.poolstat import main, table
from jmemserve.server.model import Model
from jmemserve.types import MediumReport, PoolReport


def run(model: Model, *arguments: str, opened: bool = True) -> int:
    async def body() -> int:
        async with serving(model, opened=opened) as (server, _):
            return await asyncio.to_thread(main, [server.address, *arguments])

    return asyncio.run(asyncio.wait_for(body(), 60))


def test_a_table_of_every_instance(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model) == 0
    out = capsys.readouterr().out
    assert "[####++++++..........]  50% 2 held 3 cached 5 free" in out
    assert "40.0 % of 100 tokens, 10 from DRAM" in out
    assert "decode0: 3 blocks, 12 s left" in out and "decode0 by local" in out
    assert "empty" in out and "nothing was looked up yet" in out
    assert max(map(len, out.splitlines())) <= 80


def test_json(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["media"][1]["medium"] == "DRAM" and first["leases"] == [["decode0", 3, 12.5]]
    assert second["instance"] == "empty"


def test_while_loading_and_without_a_server(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, opened=False) == 1
    assert "still loading" in capsys.readouterr().err
    for address in ("127.0.0.1:1", "127.0.0.1:99999", "nonsense", ":50051", "127.0.0.1:x"):
        assert main([address]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("watch", ["0", "-1", "nan", "inf"])
def test_a_bad_period_is_refused(watch: str) -> None:
    with pytest.raises(SystemExit):
        main(["--watch", watch])


def test_a_large_pool_fits_into_80_columns() -> None:
    media = (MediumReport("HBM", 10**6, 1, 10**6 - 2, 1, 10**13), MediumReport("DRAM", 10**7, 10**7, 0, 0, 10**14))
    counts = {field.name: 10**13 for field in dataclasses.fields(PoolReport) if field.type in (int, "int")}
    full = (*media, MediumReport("DRAM", 10**9, 10**8, 4 * 10**8, 5 * 10**8, 10**15))
    report = PoolReport("x" * 200, full, oldest=((1e9, 10**9),) * 9, peers=(("y" * 99, "z" * 99),), **counts)
    assert max(map(len, table(report).splitlines())) <= 80
