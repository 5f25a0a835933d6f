"""Stories in words, one per file, played on a cluster in virtual time. A file is read line by line; # begins a remark.

cluster NAME:ROLE ... [KEY=VALUE ...]   the members, all ready; keys: caching block blocks dram seqs tokens queue
                                        bypass more (may instances come again?) rejoins (does a zombie?)
submit ID prompt=N max=N [KEY=VALUE ...]    keys: deadline (seconds) salt tenant priority,
                                            stop=yes (the stop token ends it)
submit ID after=ID user=N max=N [...]   the next turn: all of the text of that request, and N tokens more
refused submit ... | refused move ...   the same, and it must be refused
step N  |  wait SECONDS  |  run         N turns of everybody; virtual time; until all is quiet
until CONDITION                         go on until it is true; it must become true
expect CONDITION                        it must be true now
mark                                    count from here on what is computed and moved
cancel ID  |  move ID [NAME]            what a client may ask
drain NAME  |  role NAME ROLE  |  reset     what an operator may ask
start NAME:ROLE [facts=WORD]            a process starts, perhaps a new one of a former name
kill NAME [silent]                      a process ends; silent: its machine too, and nobody is told
kill-home ID                            every process that has the request ends
pause NAME  |  resume NAME              SIGSTOP, SIGCONT
cut NAME NAME  |  heal                  no link between two instances; all links and processes are well again
slow NAME SECONDS                       the way from an instance to the front-end and back
link NAME->NAME KEY=NUMBER ...          keys: drop double swap (shares of the messages), delay (seconds)
broken SHARE                            of the pieces of blocks cannot be fetched
late SHARE                              of the messages on a link that ends, so many still come, some time later

CONDITION = state NAME STATE            of a member: loading joining ready draining left dead
          | reason NAME WORD ...        why it is dead has these words
          | refused NAME WORD ...       why it was not admitted has these words
          | tokens ID OP N              that the client has
          | output ID correct           it ended by itself, with exactly the right tokens
          | finish ID REASON            stop length abort deadline error
          | error ID WORD ...           the error's sentence has these words
          | at ID NAME STATE            where it is: waiting loading running leaving; or: at ID nowhere
          | parked ID                   no instance has it
          | hit ID OP N                 tokens of its prompt that were found in a cache
          | cached NAME ID OP N         tokens of all its text but the last that NAME could find
          | computed NAME OP N          tokens, since the start or the mark
          | moved NAME->NAME OP N       blocks, since the start or the mark
          | held NAME OP N              blocks; held NAME by PEER OP N: those allocated for a peer
          | waits NAME OP N             transfers to or from NAME under way
          | count KEY OP N              retries late doubled moves failed; preemptions, over all instances
          | nothing held                all is quiet, and nothing is left anywhere
OP = == != <= >= < >
"""

import operator
import re
from pathlib import Path

import pytest
from sim_world import NATURAL, World, prompt_of

from jmemserve.config import Role
from jmemserve.errors import JmemserveError

STORIES = sorted(Path(__file__).parent.glob("*.txt"))
OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    Story(path).play()


class Story:
    def __init__(self, path: Path):
        self.path = path
        lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
        self.lines = [(number, words) for number, words in enumerate(lines, 1) if words]

    def play(self) -> None:
        number, words = self.lines[0]
        assert words[0] == "cluster", f"{self.path.name}:{number}: a story begins with its cluster"
        members, options = [word for word in words[1:] if ":" in word], _options(words)
        numbers = {key: int(value) if value.isdigit() else value for key, value in options.items()}
        for switch in ("more", "rejoins"):
            numbers[switch] = options.get(switch, "yes") == "yes"
        with World(" ".join(members), **numbers) as world:
            self.world = world
            for number, words in self.lines[1:]:
                try:
                    self.obey(words)
                except Exception as error:
                    where = f"{self.path.name}:{number}: {' '.join(words)}"
                    raise AssertionError(f"{where}\n{type(error).__name__}: {error}\n{world.describe()}") from error
            world.check()

    def obey(self, words: list[str]) -> None:
        world = self.world
        match words:
            case ["refused", ("submit" | "move"), *_]:
                with pytest.raises(JmemserveError):
                    self.obey(words[1:])
            case ["submit", name, *_]:
                self.submit(name, _options(words))
            case ["step", count]:
                for _ in range(int(count)):
                    world.step()
            case ["wait", seconds]:
                world.wait(float(seconds))
            case ["run"]:
                world.run()
            case ["until", *condition]:
                world.until(lambda: self.holds(condition)[0], " ".join(condition))
            case ["expect", *condition]:
                true, found = self.holds(condition)
                assert true, f"it is {found}"
            case ["mark"]:
                world.mark()
            case ["cancel", name]:
                world.cancel(name)
            case ["move", name, *to]:
                world.cluster.move(name, *to)
            case ["drain", name]:
                world.cluster.drain_instance(name)
            case ["role", name, role]:
                world.cluster.set_role(name, Role(role))
            case ["reset"]:
                world.cluster.reset_prefix_cache()
            case ["start", member, *_]:
                world.start(*member.split(":"), _options(words).get("facts", ""))
            case ["kill", name, *silent]:
                world.kill(name, silent == ["silent"])
            case ["kill-home", name]:
                for home in world.where(name):
                    world.kill(home)
            case [("pause" | "resume") as what, name]:
                world.processes[name].paused = what == "pause"
            case ["cut", one, other]:
                world.cut(one, other)
            case ["heal"]:
                world.heal()
            case ["slow", name, seconds]:
                world.front_weather[name].delay = float(seconds)
            case ["link", way, *_]:
                for key, value in _options(words).items():
                    setattr(world.peer_weather[_way(way)], key, float(value))
            case ["broken", share]:
                world.wire.broken = float(share)
            case ["late", share]:
                world.late = float(share)
            case _:
                raise AssertionError("there is no such command")

    def submit(self, name: str, options: dict[str, str]) -> None:
        world = self.world
        if "after" in options:
            prompt = [*world.clients[options.pop("after")].text, *prompt_of(name, int(options.pop("user")))]
        else:
            prompt = prompt_of(name, int(options.pop("prompt")))
        deadline = float(options.pop("deadline")) if "deadline" in options else None
        priority = int(options.pop("priority", 0))
        world.submit(name, prompt, int(options.pop("max")), deadline, priority=priority, **options)

    def holds(self, words: list[str]) -> tuple[bool, object]:
        """Whether a condition is true, and what was found."""
        world = self.world
        match words:
            case [*what, sign, number] if sign in OPERATORS:
                found = self.number(what)
                return OPERATORS[sign](found, int(number)), found
            case ["state", name, state]:
                now = world.state(name)
                return now is not None and now.value == state, now
            case ["reason", name, *some]:
                record = world.membership.get(name)
                reason = record.reason if record is not None else ""
                return " ".join(some) in reason, reason
            case ["refused", name, *some]:
                return " ".join(some) in (world.processes[name].refused or "-"), world.processes[name].refused
            case ["output", name, "correct"]:
                world.clients[name].check()
                return world.clients[name].finish in NATURAL, world.clients[name]
            case ["finish", name, reason]:
                finish = world.clients[name].finish
                return finish is not None and finish.value == reason, finish
            case ["error", name, *some]:
                return " ".join(some) in world.clients[name].error, world.clients[name].error
            case ["at", name, "nowhere"]:
                return not world.where(name), world.where(name)
            case ["at", name, instance, state]:
                return world.where(name).get(instance) == state, world.where(name)
            case ["parked", name]:
                ticket = world.gateway._tickets[world.gateway._inner[name]]
                return not ticket.homes, ticket.homes
            case ["nothing", "held"]:
                world.check_quiet()
                return world.quiet(), world.describe()
        raise AssertionError("there is no such condition")

    def number(self, words: list[str]) -> int:
        world = self.world
        match words:
            case ["tokens", name]:
                return len(world.clients[name].tokens)
            case ["hit", name]:
                return world.clients[name].cached
            case ["cached", instance, name]:
                client = world.clients[name]
                return world.processes[instance].instance.pool.peek(client.text, client.request.salt)
            case ["computed", instance]:
                return world.processes[instance].model.computed
            case ["moved", way]:
                return world.wire.moved.get(_way(way), 0)
            case ["held", instance]:
                return world.processes[instance].instance.pool.held
            case ["held", instance, "by", peer]:
                return world.processes[instance].instance.pool.owned().get(peer, 0)
            case ["waits", instance]:
                node = world.processes[instance].instance.node
                return len(node.sender) + len(node.receiver)
            case ["count", "preemptions"]:
                return sum(process.instance.scheduler.preemptions for process in world.processes.values())
            case ["count", key]:
                return getattr(world.gateway.counts, key)
        raise AssertionError("there is no such number")


def _options(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words if re.fullmatch(r"[a-z]+=[^=]+", word))


def _way(text: str) -> tuple[str, str]:
    source, target = text.split("->")
    return source, target
