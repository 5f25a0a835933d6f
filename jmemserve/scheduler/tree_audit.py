"""The prompt tree recomputed from scratch, for tests."""

from typing import TYPE_CHECKING

from jmemserve.scheduler.tree_nodes import nodes

if TYPE_CHECKING:
    from jmemserve.scheduler.prompt_tree import PromptTree


def check(tree: "PromptTree") -> None:
    """Assert that runs, masks and counts agree."""
    bits = 0
    copies = dict.fromkeys(tree.slots, 0)
    for slot in tree.slots.values():
        assert not bits & slot.bit, f"{slot.name} shares its bit"
        bits |= slot.bit
    blocks = num_nodes = 0
    for key, root in tree.roots.items():
        assert root.key == key and root.children, f"the root {key!r} is empty"
        assert (root.start, root.stop, root.run, root.hbm, root.dram) == (0, 0, b"", 0, 0), f"{root.start=} {root.run=}"
    for node in nodes(tree.roots.values()):
        above = node.parent
        num_nodes += 1
        blocks += node.stop - node.start
        span = f"blocks {node.start} to {node.stop}"
        assert node.stop > node.start and len(node.run) == (node.stop - node.start) * tree.step, f"{span}: {node.run!r}"
        assert node.stop - node.start <= tree.run_limit, f"{span} are too many"
        assert node.into is None and above is not None and above.stop == node.start, f"{span} are at the wrong place"
        assert above.children.get(node.run[: tree.step]) is node, f"{span} have a wrong key"
        assert not (node.hbm | node.dram) & ~bits, f"{span} are held by who is gone"
        assert node.hbm or node.dram or node.children, f"{span} are held by nobody"
        assert all((node.hbm | node.dram) & slot.bit for slot in node.times or ()), f"{span} have times of others"
        assert node.times is None or node.times, f"{span}: {node.times=}"
        if above.run and len(above.children) == 1 and above.alike(node):
            assert node.stop - above.start > tree.run_limit, f"{span} are like those above"
        for slot in tree.slots.values():
            both = bool(node.hbm & slot.bit) + bool(node.dram & slot.bit)
            copies[slot.name] += both * (node.stop - node.start)
            before = None if above.times is None else above.times.get(slot)
            if node.times is not None and slot in node.times and above.run:
                assert before is not None and before >= node.times[slot], f"{span} outlive those above"
    assert (blocks, num_nodes) == (tree.num_blocks, tree.num_nodes), f"{(blocks, num_nodes)=}, {tree.num_blocks=}"
    assert num_nodes <= blocks <= tree.max_blocks, f"{num_nodes=} {blocks=} {tree.max_blocks=}"
    for name, count in copies.items():
        assert tree.slots[name].copies == count, f"{name}: {tree.slots[name].copies=}, {count=}"
