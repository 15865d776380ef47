"""Two machines, each with a network, a disk and processes of its own: one is lost, or the cable between them."""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.training.killing import OPTIONS, differences, outcome
from tests.training.support import write_images

REPOSITORY = Path(__file__).parents[2]
PORT = 29500  # each host has all ports to itself
EPOCHS, UPDATES = 12, 36


def _why_not():
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "this machine allows no network namespaces"


WHY_NOT = _why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


class Host:
    """A machine: namespaces that live as long as a process which waits for the end of this one."""

    def __init__(self, number: int, folder: Path, images: Path) -> None:
        self.number, self.folder = number, folder
        prepare = (
            f"mount -t tmpfs none {folder} && cp -r {images} {folder}/images && hostname host{number} && "
            "ip link set lo up && echo ready && exec cat"
        )
        self.keeper = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "sh", "-c", prepare],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.keeper.stdout.readline() == b"ready\n"
        self.disk = Path(f"/proc/{self.keeper.pid}/root{folder}")  # as seen from outside
        self.running = None

    def inside(self, *words):
        return ["nsenter", f"--target={self.keeper.pid}", "--net", "--mount", "--uts", "--", *words]

    def cable(self, state):
        subprocess.run(self.inside("ip", "link", "set", "eth0", state), check=True)

    def start(self, words):
        """Start a rank as the page says, in a pid namespace whose end is that of everything in it."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                    f"--node-rank={self.number}", "--master-addr=10.0.0.1", f"--master-port={PORT}"]  # fmt: skip
        environment = {
            **os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        with (self.folder.parent / f"{self.number}.log").open("w") as log:
            self.running = subprocess.Popen(
                self.inside("unshare", "--pid", "--mount-proc", "--fork", "--kill-child",
                            *launcher, "-m", "bnfinetune", *words),
                cwd=self.folder.parent, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def said(self):
        return (self.folder.parent / f"{self.number}.log").read_text()

    def power_off(self):
        if self.running is not None:
            self.running.kill()
            self.running.wait()

    def close(self):
        self.power_off()
        self.keeper.stdin.close()
        self.keeper.wait()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two hosts and a cable between them; all of it is gone with the processes that keep it."""
    folder = tmp_path_factory.mktemp("hosts")
    images = write_images(folder / "images", train=8)
    (folder / "disk").mkdir()
    with ExitStack() as stack:
        hosts = [stack.enter_context(closing(Host(number, folder / "disk", images))) for number in range(2)]
        ends = [f"netns {host.keeper.pid}" for host in hosts]
        subprocess.run(f"ip link add eth0 {ends[0]} type veth peer name eth0 {ends[1]}".split(), check=True)
        for host in hosts:
            subprocess.run(host.inside(*f"ip addr add 10.0.0.{host.number + 1}/24 dev eth0".split()), check=True)
            host.cable("up")
        yield hosts


@pytest.fixture(scope="module")
def expected(machines):
    """What a run gives that nothing befalls."""
    start(machines, "whole")
    assert end(machines) == [0, 0], everything_said(machines)
    return outcome(machines[0].disk / "whole")


@pytest.fixture
def hosts(machines):
    yield machines
    for host in machines:
        host.power_off()
        host.cable("up")


def start(hosts, name, **more):
    disk = hosts[0].folder
    options = {**OPTIONS, "train.epochs": EPOCHS, "data.workers": 0, "train.batch_size": 2, "checkpoint.every_steps": 1,
               "data.source": disk / "images", "run.dir": disk / name, "train.resume": "auto", **more}  # fmt: skip
    for host in hosts:
        host.start(["recipe=full", *(f"{key}={value}" for key, value in options.items())])


def end(hosts):
    codes = [host.running.wait(timeout=200) for host in hosts]
    assert [path.name for path in hosts[1].disk.iterdir()] == ["images"]  # the disk of the first is enough
    return codes


def everything_said(hosts):
    return "\n".join(host.said() for host in hosts)


def reached(host, name):
    """The last update that a run has saved."""
    return max((int(path.name[-8:]) for path in (host.disk / name).glob("checkpoints/update-????????")), default=0)


def wait_until(update, hosts, name):
    while reached(hosts[0], name) < update:
        assert all(host.running.poll() is None for host in hosts), everything_said(hosts)
        time.sleep(0.005)


def test_hosts_that_are_killed_in_turn_go_on_to_the_same_bits(hosts, expected):
    for lost, update in ((1, 5), (0, 15)):
        start(hosts, "run")
        wait_until(update, hosts, "run")
        hosts[lost].power_off()
        assert hosts[1 - lost].running.wait(timeout=100) != 0
        assert "another process has ended, or gave no answer" in hosts[1 - lost].said(), everything_said(hosts)
        assert reached(hosts[0], "run") < UPDATES
    start(hosts, "run")
    assert end(hosts) == [0, 0], everything_said(hosts)
    assert re.search(rf"^resume  after update \d+ of {UPDATES}", hosts[0].said(), re.MULTILINE)
    assert differences(expected, outcome(hosts[0].disk / "run")) == []


@pytest.mark.long
def test_an_outage_of_the_network_is_sat_out(hosts, expected):
    start(hosts, "outage")
    wait_until(5, hosts, "outage")
    hosts[1].cable("down")
    before = reached(hosts[0], "outage")
    time.sleep(3)
    assert reached(hosts[0], "outage") <= before + 1  # of the update under way
    hosts[1].cable("up")
    assert end(hosts) == [0, 0], everything_said(hosts)
    assert differences(expected, outcome(hosts[0].disk / "outage")) == []


@pytest.mark.long
def test_an_outage_beyond_the_timeout_ends_all_ranks_and_they_go_on_from_there(hosts, expected):
    start(hosts, "long", **{"train.timeout_minutes": 0.2})
    wait_until(5, hosts, "long")
    hosts[1].cable("down")
    for host in hosts:
        assert host.running.wait(timeout=100) != 0
        assert "gave no answer for train.timeout_minutes=0.2" in host.said()
    hosts[1].cable("up")
    start(hosts, "long")
    assert end(hosts) == [0, 0], everything_said(hosts)
    found = outcome(hosts[0].disk / "long")
    assert differences(expected, found) == []
