"""The Ray backend: the same bytes as serial, whatever is lost on the way."""

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from families import load, make_family, superpose, weights

import superpose as library
from superpose import SuperposeError
from superpose.backends import make_backend
from superpose.elsewhere import MergeElsewhere, with_inputs_checked
from superpose.planning import Settings, make_plan
from superpose.recipe import load_recipe
from superpose.records import RunRecord
from superpose.registry import registered

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all of them, however many processes run tests

PLAIN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""What Ray finds in the environment of clusters that tests start themselves."""


def recipe(folders, **more):
    return {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], **more}


def sent(value):
    """Return what another process gets."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@pytest.fixture(scope="module")
def connected():
    """A cluster of one node that this process is connected to, as a user's own program may be."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PLAIN.items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "stf", "emr"])
def test_the_bytes_are_those_of_serial(tmp_path, connected, method):
    folders = make_family(tmp_path, layers=2)
    library.merge(recipe(folders, method=method), tmp_path / "serial", backend="serial")
    record = library.merge(recipe(folders, method=method), tmp_path / "ray", backend="ray")
    assert weights(tmp_path / "ray") == weights(tmp_path / "serial")
    assert {p.name for p in (tmp_path / "ray").rglob("*")} == {p.name for p in (tmp_path / "serial").rglob("*")}
    if method == "emr":
        masks = "tasks/masks.safetensors"
        assert (tmp_path / "ray" / masks).read_bytes() == (tmp_path / "serial" / masks).read_bytes()
    assert record.settings["backend"] == "ray"
    assert record.settings["workers"] == 2
    assert len(record.settings["ray_nodes"]) == 1
    assert ray.is_initialized(), "a connection that the caller made is the caller's to end"


def add_up(value):
    value += 1
    return value


def large_table(number):
    return torch.full((200_000,), float(number)).numpy()


def test_large_results_can_be_added_to(connected, carry):
    """Surveys add values up in place; Ray's own arrays are read-only from some size on."""
    results = [add_up(value) for _, value in make_backend("ray", 2, 10**9).map(carry(large_table), [1, 2], [1, 1])]
    assert sorted(float(value[-1]) for value in results) == [2.0, 3.0]


def test_comparing_gives_the_same_numbers(tmp_path, connected):
    folders = make_family(tmp_path)
    found = [library.compare(folders[0], folders[1:], backend=backend) for backend in ("serial", "ray")]
    assert str(found[0]) == str(found[1])


@pytest.mark.parametrize("method", ["ties", "stf", "emr"])
def test_where_the_output_is_not_shared_the_bytes_come_back(tmp_path, connected, monkeypatch, method):
    folders = make_family(tmp_path)
    library.merge(recipe(folders, method=method), tmp_path / "serial", backend="serial")
    # A worker on whose machine the output's folder is another one, or none, finds no sign in it.
    monkeypatch.setattr("superpose.elsewhere._sign_in", lambda _: contextlib.nullcontext("no-such-sign"))
    library.merge(recipe(folders, method=method, output={"shard_size": 4000}), tmp_path / "sharded", backend="ray")
    library.merge(recipe(folders, method=method), tmp_path / "ray", backend="ray")
    assert weights(tmp_path / "ray") == weights(tmp_path / "serial")
    whole, pieces = load(tmp_path / "serial"), load(tmp_path / "sharded")
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items())


def test_who_sees_the_folder_sends_nothing_back_and_stops_when_the_sign_is_gone(tmp_path):
    from superpose.checkpoints.writer import StreamWriter
    from superpose.merge_tensor import Context

    plan = make_plan(load_recipe(recipe(make_family(tmp_path), method="average")), Settings())
    context = Context(plan.recipe.task_names, plan.weights, torch.device("cpu"), measure=False)
    item = max(plan.items, key=lambda item: item.numel)
    writer = StreamWriter(tmp_path, plan.layout)
    work = sent(MergeElsewhere({}, context, plan.layout, tmp_path, "sign"))
    record, pieces = work(item)
    assert pieces
    assert writer.digest(item.name) != record.sha256
    (tmp_path / "sign").touch()
    record, pieces = work(item)
    assert not pieces
    assert writer.digest(item.name) == record.sha256
    seen = iter([True, False])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergeElsewhere, "_sees_folder", lambda _: next(seen))
        with pytest.raises(RuntimeError, match="has ended"):
            work(item)
    writer.close()


def failing(item):
    if item == 3:
        raise SuperposeError("no good", where="item 3", mend="take another")
    return item


def unpicklable(item):
    class Odd(Exception):
        pass

    raise Odd(f"at {item}")


class Carried:
    """A function that is pickled by value."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return ray.cloudpickle.loads, (ray.cloudpickle.dumps(self.function),)


@pytest.fixture
def carry():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield Carried
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_an_error_comes_as_itself_and_is_not_tried_again(tmp_path, connected, carry):
    tries = tmp_path / "tries"

    def work(item):
        with tries.open("a") as stream:
            stream.write(f"{item}\n")
        return failing(item)

    backend = make_backend("ray", 2, 1 << 30)
    with pytest.raises(SuperposeError) as caught:
        list(backend.map(carry(work), range(8), [0] * 8))
    backend.close()
    assert (caught.value.what, caught.value.where, caught.value.mend) == ("no good", "item 3", "take another")
    assert "in failing" in str(caught.value.__cause__)
    assert tries.read_text().split().count("3") == 1


def test_an_error_that_cannot_travel_is_told_in_words(connected, carry):
    backend = make_backend("ray", 1, 0)
    with pytest.raises(RuntimeError, match="Odd: at 0"):
        list(backend.map(carry(unpicklable), [0], [0]))


def test_memory_in_flight_stays_within_the_budget(tmp_path, connected, carry):
    log = tmp_path / "log"

    def work(item):
        import time

        with log.open("a") as stream:
            stream.write(f"+{item}\n")
        time.sleep(0.1)
        with log.open("a") as stream:
            stream.write(f"-{item}\n")
        return item

    sizes = [100, 60, 60, 30, 30, 10]
    backend = make_backend("ray", 2, 90)
    assert sorted(backend.map(carry(work), range(6), sizes)) == [(index, index) for index in range(6)]
    running = set()
    for line in log.read_text().split():
        running ^= {int(line[1:])}
        assert sum(sizes[index] for index in running) <= 90 or len(running) == 1
    assert backend.workers == 2


def test_a_missing_or_other_input_on_a_node_is_named(tmp_path, connected):
    folders = make_family(tmp_path)
    plan = make_plan(load_recipe(recipe(folders, method="average")), Settings(backend="ray"))
    backend = with_inputs_checked(make_backend("ray", None, 1 << 30), plan.items)
    file = folders[2] / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(SuperposeError, match="another file on a node") as caught:
        list(backend.map(repr, plan.items, [0] * len(plan.items)))
    assert str(file) in caught.value.where
    file.unlink()
    with pytest.raises(SuperposeError, match="cannot be read on a node: No such file") as caught:
        list(backend.map(repr, plan.items, [0] * len(plan.items)))
    assert "share" in caught.value.mend


def test_other_code_on_a_node_is_refused(connected, monkeypatch):
    monkeypatch.setattr("superpose.backends.ray._identity", lambda: "superpose 0 (code 0)")
    with pytest.raises(SuperposeError, match="other code") as caught:
        list(make_backend("ray", 1, 0).map(abs, [1], [0]))
    assert f"torch {torch.__version__}" in caught.value.what
    assert "all nodes" in caught.value.mend


def test_plug_ins_are_known_to_workers(tmp_path, connected):
    (tmp_path / "mine.py").write_text(
        '"""Sum."""\nfrom dataclasses import dataclass\n'
        "from superpose.registry import merge_method\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Options:\n    factor: float = 0.5\n\n\n"
        '@merge_method("halves", options=Options, source="none", breaks={l: "test" for l in ("single", "same")})\n'
        "def halves(task_vectors, options):\n    return options.factor * task_vectors.sum(dim=0)\n"
    )
    folders = make_family(tmp_path)
    for backend in ("serial", "ray"):  # in its own folder: the path is relative
        command = [sys.executable, "-m", "superpose", "merge", *map(str, folders), "-q", "--method", "halves"]
        environment = {**os.environ, "SUPERPOSE_METHODS": "mine.py"}
        if backend == "ray":
            command += ["--ray-address", ray.get_runtime_context().gcs_address]
        command += ["--backend", backend, "-o", str(tmp_path / backend)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "ray") == weights(tmp_path / "serial")
    assert RunRecord.load(tmp_path / "ray").settings["ray_address"]


class Pickling:
    """A backend that pickles whatever goes out and comes back."""

    workers, in_process = 1, False

    def map(self, function, items, memory):
        for index, item in enumerate(items):
            there, received = sent((function, item))
            yield index, sent(there(received))

    def facts(self):
        return {"workers": 1}

    def close(self):
        pass


@pytest.mark.parametrize("method", [method.name for method in registered() if not method.needs])
def test_every_method_can_travel(tmp_path, monkeypatch, method):
    folders = make_family(tmp_path, layers=1, tasks=2)[: 2 if method == "slerp" else 3]
    library.merge(recipe(folders, method=method), tmp_path / "serial", backend="serial")
    monkeypatch.setattr("superpose.run.make_backend", lambda *_: Pickling())
    library.merge(recipe(folders, method=method), tmp_path / "sent")
    assert weights(tmp_path / "sent") == weights(tmp_path / "serial")


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("nonsense", "no address of a Ray cluster"),
        ("ray://127.0.0.1:10001", "no address of a Ray cluster"),
        ("127.0.0.1:9", "no Ray cluster can be reached"),
        ("no-such-host.invalid:6379", "no Ray cluster can be reached"),
    ],
)
def test_an_address_where_no_cluster_is(tmp_path, address, what):
    folders = make_family(tmp_path)
    more = ["--backend", "ray", "--ray-address", address]
    done = superpose("merge", *folders, "-o", tmp_path / "out", "-m", "average", *more, check=False, **PLAIN)
    assert done.returncode == 2
    assert what in done.stderr
    assert f"--ray-address {address}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_address_is_for_ray_alone(tmp_path):
    folders = make_family(tmp_path)
    for verb in (["merge", "-o", tmp_path / "out"], ["plan"], ["compare"]):
        done = superpose(verb[0], *folders, *verb[1:], "--ray-address", "auto", check=False)
        assert done.returncode == 2
        assert "mend: add --backend ray" in done.stderr


def test_without_ray_the_extra_is_named(tmp_path):
    folders = make_family(tmp_path)
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError(\"No module named 'ray'\")\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = superpose("plan", *folders, "--backend", "ray", "--densty", "1", check=False, PYTHONPATH=path)
    assert done.returncode == 2
    assert "mend: pip install 'superpose[ray]'" in done.stderr
    assert "densty" in done.stderr, "with all other problems"
    assert superpose("merge", *folders, "-o", tmp_path / "out", PYTHONPATH=path).returncode == 0


@pytest.mark.slow
def test_a_cluster_of_its_own_from_the_command_line(tmp_path):
    folders = make_family(tmp_path)
    superpose("merge", *folders, "-o", tmp_path / "serial", "--backend", "serial")
    environment = {name: value for name, value in PLAIN.items() if name != "RAY_AUTH_MODE"}
    home = tmp_path / "home"
    home.mkdir()
    options = ["--backend", "ray", "--workers", "1"]
    done = superpose("merge", *folders, "-o", tmp_path / "ray", *options, HOME=str(home), **environment)
    assert weights(tmp_path / "ray") == weights(tmp_path / "serial")
    assert RunRecord.load(tmp_path / "ray").settings["workers"] == 1
    assert not list(home.rglob("auth_token")), "a later `ray start` would ask for tokens"
    assert "ray" not in done.stderr.lower(), "Ray itself is silent"


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def journal_lines(folder):
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.slow
def test_interrupted_it_goes_on_where_it_was(tmp_path):
    folders = make_family(tmp_path, layers=40, width=160)
    library.merge(recipe(folders, method="stf"), tmp_path / "threads")
    command = [sys.executable, "-m", "superpose", "merge", *map(str, folders), "-o", str(tmp_path / "out")]
    # Ray itself can fall over a task that ends while it is cancelled (docs/reliability.md): then it is asked once more.
    for _ in range(3):
        process = subprocess.Popen(
            [*command, "--quiet", "--backend", "ray"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **PLAIN},
            start_new_session=True,
            # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        wait_for(lambda: journal_lines(tmp_path / "out.partial") >= 10)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to all processes of the group
        _, text = process.communicate(timeout=60)
        if "Tried to complete task that was not pending" not in text:
            break
        shutil.rmtree(tmp_path / "out.partial")
    assert process.returncode == 130, text
    assert "run the same command again" in text
    assert "Traceback" not in text
    finished = journal_lines(tmp_path / "out.partial")
    record = library.merge(recipe(folders, method="stf"), tmp_path / "out")
    assert 10 <= record.totals["resumed"] == finished < record.totals["tensors"]
    assert weights(tmp_path / "out") == weights(tmp_path / "threads")


@pytest.fixture
def three_nodes(monkeypatch):
    """A head that takes no tasks, and two nodes that do."""
    from ray.cluster_utils import Cluster

    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    # Ray's own patience is some 17 seconds.
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 0}
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    cluster.shutdown()


SLOW_SUM = '''"""A sum that takes its time, and leaves marks of where it was begun and ended."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class Options:
    """None."""


@merge_method("slow_sum", options=Options, source="none", breaks={"same": "a sum"})
def slow_sum(task_vectors, options, *, generator):
    marks = Path(__file__).parent / "marks"
    if "RAY_JOB_ID" in os.environ:
        import ray

        where = f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}-{time.monotonic_ns()}"
        (marks / f"begun-{where}").touch()
        time.sleep(0.3)
        (marks / f"ended-{where}").touch()
    return task_vectors.sum(dim=0)
'''


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_a_node_is_killed_in_mid_merge(tmp_path, three_nodes, monkeypatch, shared):
    cluster, (lost, left) = three_nodes
    folders = make_family(tmp_path, layers=6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "slow_sum.py").write_text(SLOW_SUM)
    (tmp_path / "mine" / "marks").mkdir()

    def marks(kind, node):
        return {file.name.partition("-")[2] for file in (tmp_path / "mine" / "marks").glob(f"{kind}-{node.node_id}-*")}

    command = [sys.executable, "-m", "superpose", "merge", *map(str, folders), "--method", "slow_sum", "--quiet"]
    environment = {**os.environ, "SUPERPOSE_METHODS": str(tmp_path / "mine")}
    subprocess.run([*command, "-o", str(tmp_path / "serial"), "--backend", "serial"], env=environment, check=True)
    script = [sys.executable, "-c", NOT_SHARED, *command[3:]] if not shared else command
    process = subprocess.Popen(
        [*script, "-o", str(tmp_path / "out"), "--backend", "ray", "--ray-address", cluster.address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def in_the_middle():
        assert process.poll() is None, process.stderr.read()
        return marks("ended", lost) and marks("begun", lost) - marks("ended", lost)

    wait_for(in_the_middle)
    finished = journal_lines(tmp_path / "out.partial")
    # As when a machine is lost: Ray's process on it first, so that nobody tells of the worker's end.
    workers = {int(mark.split("-")[1]) for mark in marks("begun", lost)}
    for pid in [lost.all_processes["raylet"][0].process.pid, *workers]:
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(lost, allow_graceful=False)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert marks("begun", lost) - marks("ended", lost), "a task was on the node when it was killed"
    assert 0 < finished < len(load(folders[0])) - 4
    assert len(marks("ended", left)) >= len(load(folders[0])) - finished - 1
    assert weights(tmp_path / "out") == weights(tmp_path / "serial")
    assert len(RunRecord.load(tmp_path / "out").settings["ray_nodes"]) == 2


NOT_SHARED = """
import contextlib, sys
from superpose import cli, elsewhere
elsewhere._sign_in = lambda _: contextlib.nullcontext("no-such-sign")
sys.argv[0] = "superpose"
cli.main()
"""
