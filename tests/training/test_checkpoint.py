"""Checkpoints: a run goes on bit for bit, nothing but the right one is read, and reading runs no code."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax

CHEAP = dict(method=tinyjax.methods.random0, update=None, fill=None)
KEY = jax.random.key(3)


def make_batches(n):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 16, 5))
    return [{"x": jnp.asarray(x[i]), "t": jnp.asarray(np.sin(2 * x[i, :, :3]))} for i in range(n)]


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["u"] + params["c"] - batch["t"]) ** 2)


def init(width=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (5, width), "b": (width,), "u": (width, 3), "c": (3,)}
    return {name: jnp.asarray(rng.normal(size=shape)) / 2 for name, shape in shapes.items()}


def make_optimizer():
    return tinyjax.with_birth(optax.adam(optax.linear_schedule(1e-2, 1e-3, 10)))


SCHEDULE = tinyjax.every(2, 2, final=10)


def fit(params, batches, **options):
    options = dict(num_neurons=2, growth_samples=32, policy=tinyjax.multiple_of(8), **CHEAP) | options
    return list(tinyjax.fit(loss_fn, params, iter(batches), make_optimizer(), SCHEDULE, options.pop("key"), **options))


@pytest.fixture(scope="module")
def whole():
    """An unbroken run: 4 -> 10 neurons, capacities 8 and 16."""
    return fit(init(), make_batches(7), key=KEY)


def saved_at(directory, record, **options):
    tinyjax.save(directory, record, key=KEY, **options)
    return directory


@pytest.mark.parametrize("stop", [1, 4])
def test_a_restored_run_goes_on_bit_for_bit(whole, tmp_path, stop):
    saved_at(tmp_path, whole[stop - 1])
    saved = tinyjax.restore(tmp_path, make_optimizer())
    record = whole[stop - 1]
    chex.assert_trees_all_equal((saved.params, saved.opt_state), (record.params, record.opt_state))
    assert jax.tree.structure(saved.opt_state) == jax.tree.structure(record.opt_state)
    assert saved.sites == record.sites and saved.step == stop
    chex.assert_trees_all_equal(saved.history, record.history)
    resumed = fit(saved.params, make_batches(7)[stop:], key=saved.key, **saved.progress())
    last = whole[-1]
    chex.assert_trees_all_equal((resumed[-1].params, resumed[-1].opt_state), (last.params, last.opt_state))
    assert resumed[-1].width == last.width == {"w": 10} and saved.capacities == {"w": 8}


def test_everything_else_comes_back_as_it_was(whole, tmp_path):
    extra = {"log": [1, 2.5, "x", None, True, float("inf")], 3: (np.arange(3, dtype=np.int8), jnp.ones(2)), "n": np.nan}
    extra["half"] = jnp.array([1.5], jnp.bfloat16)
    tinyjax.save(tmp_path, whole[0], key=jax.random.PRNGKey(1), position=(2, 5), extra=extra)
    saved = tinyjax.restore(tmp_path, make_optimizer())
    assert saved.position == (2, 5)
    np.testing.assert_array_equal(saved.key, jax.random.PRNGKey(1))
    assert saved.extra["log"] == extra["log"] and np.isnan(saved.extra["n"])
    chex.assert_trees_all_equal(saved.extra[3], extra[3])
    assert saved.extra["half"].dtype == jnp.bfloat16


def test_all_kinds_of_leaves_keep_dtype_weakness_and_bits(tmp_path):
    params = {
        "half": jnp.array([1.5, np.nan], jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7), 3),
        "nested": [jnp.float32(-0.0), (jnp.array(True), None), {}],
        "weak": jnp.asarray(0.1),
        "number": 3,
        "complex": jnp.array([1j]),
    }
    tinyjax.save(tmp_path, tinyjax.training.checkpoint.Checkpoint(0, params, None, tinyjax.Sites([])))
    back = tinyjax.restore(tmp_path).params
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert [jnp.asarray(x).aval for x in jax.tree.leaves(back)] == [
        jnp.asarray(x).aval for x in jax.tree.leaves(params)
    ]
    bits = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()  # noqa: E731
    assert [bits(jnp.asarray(x)) for x in jax.tree.leaves(back)] == [
        bits(jnp.asarray(x)) for x in jax.tree.leaves(params)
    ]


def test_the_newest_three_are_kept(whole, tmp_path):
    for record in whole[:5]:
        saved_at(tmp_path, record)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4", "5"]
    assert tinyjax.restore(tmp_path, make_optimizer()).step == 5
    assert tinyjax.restore(tmp_path, make_optimizer(), step=4).step == 4
    saved_at(tmp_path, whole[4])  # the same again is nothing new
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1 in .*; there are \[3, 4, 5\]"):
        tinyjax.restore(tmp_path, make_optimizer(), step=1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*none"):
        tinyjax.restore(tmp_path / "nowhere", make_optimizer())


def test_another_run_is_not_mixed_in(whole, tmp_path):
    saved_at(tmp_path, whole[4])
    with pytest.raises(ValueError, match="holds a checkpoint of step 5, later than this one, 1: it is of another run"):
        saved_at(tmp_path, whole[0])
    other = whole[4]._replace(params=jax.tree.map(lambda x: x + 1, whole[4].params))
    with pytest.raises(ValueError, match="holds another run's checkpoint of step 5"):
        saved_at(tmp_path, other)


def test_containers_that_are_not_plain_need_a_model(tmp_path):
    net = eqx.nn.MLP(5, 3, width_size=4, depth=1, key=jax.random.key(0))
    arrays, static = eqx.partition(net, eqx.is_inexact_array)
    loss = lambda p, b: jnp.mean((jax.vmap(eqx.combine(p, static))(b["x"]) - b["t"]) ** 2)  # noqa: E731
    sites = tinyjax.find_sites(loss, arrays, make_batches(1)[0])
    wide, sites = tinyjax.resize(arrays, sites, {"layers/0": 6})
    tinyjax.save(tmp_path, tinyjax.training.checkpoint.Checkpoint(1, wide, None, sites))
    with pytest.raises(ValueError, match="not made of dicts, lists and tuples alone: pass `like=params`"):
        tinyjax.restore(tmp_path)
    back = tinyjax.restore(tmp_path, like=arrays).params
    chex.assert_trees_all_equal(back, wide)
    assert isinstance(back, eqx.nn.MLP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"d": jnp.ones(3)}, "another run: it has no `d`, which the model has here"),
        (lambda p: {k: p[k] for k in "wbu"}, "another run: the model here has no `c`"),
        (lambda p: p | {"w": jnp.ones((6, 4))}, r"another model: its `w` is float64\[5, 8\], here .*\[6, 4\]"),
        (lambda p: p | {"c": jnp.ones(4)}, r"another model: its `c` is float64\[3\]"),
        (lambda p: jax.tree.map(lambda x: x.astype("float32"), p), "another model: its .* is float64.* here .*float32"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(whole, tmp_path, change, message):
    saved_at(tmp_path, whole[0])
    assert tinyjax.restore(tmp_path, make_optimizer(), like=init(2)).step == 1
    with pytest.raises(ValueError, match=message):
        tinyjax.restore(tmp_path, make_optimizer(), like=change(init()))


def test_another_optimizer_or_precision_is_refused(whole, tmp_path):
    saved_at(tmp_path, whole[0])
    with pytest.raises(ValueError, match=r"another run: the optimizer here has no `births"):
        tinyjax.restore(tmp_path, optax.sgd(0.1))
    with pytest.raises(ValueError, match="saved with an optimizer's state: pass its `optimizer`"):
        tinyjax.restore(tmp_path)
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"`b` was saved in float64, .*jax_enable_x64"):
        tinyjax.restore(tmp_path, make_optimizer())


def files(directory):
    return sorted(path for path in Path(directory).rglob("*") if path.is_file())


def test_damage_is_named_or_harmless(whole, tmp_path):
    """Every file cut short, every file with a flipped bit: the run comes back as it was, or an error says where."""
    saved_at(tmp_path, whole[0])
    saved_at(tmp_path, whole[1])
    refused = 0
    for path in files(tmp_path / "2"):
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        for damaged in (content[:middle], flipped):
            path.write_bytes(damaged)
            try:
                saved = tinyjax.restore(tmp_path, make_optimizer())
            except ValueError as error:
                refused += 1
                assert f"{tmp_path}/2 is damaged" in str(error) and "pass `step=1`" in str(error)
            else:
                chex.assert_trees_all_equal((saved.params, saved.opt_state), (whole[1].params, whole[1].opt_state))
        path.write_bytes(content)
    assert refused >= 6  # Orbax keeps some files that nothing reads
    assert tinyjax.restore(tmp_path, make_optimizer(), step=1).step == 1


def test_a_damaged_step_is_not_taken_for_the_one_that_is_saved(whole, tmp_path):
    """A run that went on from an older checkpoint reaches the damaged one: it says what to do, and removing it does."""
    saved_at(tmp_path, whole[0])
    saved_at(tmp_path, whole[1])
    (tmp_path / "2" / "record" / "metadata").write_text("{}")
    with pytest.raises(ValueError, match=r"2 is damaged .*; remove it, or pass `step=1`, to go on from there"):
        saved_at(tmp_path, whole[1])
    shutil.rmtree(tmp_path / "2")
    saved_at(tmp_path, whole[1])
    assert tinyjax.restore(tmp_path, make_optimizer()).step == 2


@contextlib.contextmanager
def full_disk(limit):
    """No file can grow beyond the limit: writes fail as they do when no space is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 20_000], ids=["record", "arrays"])
def test_a_full_disk_costs_no_checkpoint(tmp_path, limit):
    """The older ones stay, and the next save that fits takes away what the failed one left."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 100_000), np.uint8)  # no codec makes it smaller
    runs = [
        tinyjax.training.checkpoint.Checkpoint(i, {"big": jnp.asarray(x)}, None, tinyjax.Sites([]))
        for i, x in enumerate(noise)
    ]
    tinyjax.save(tmp_path, runs[0])
    with (
        full_disk(limit),
        pytest.raises(OSError, match=r"could not save .*/1: .* before it are as they were"),
    ):
        tinyjax.save(tmp_path, runs[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0"]  # nothing half-written stays
    assert tinyjax.restore(tmp_path).step == 0
    tinyjax.save(tmp_path, runs[2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "2"]
    np.testing.assert_array_equal(tinyjax.restore(tmp_path).params["big"], noise[2])


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_full_disk_leaves_no_folder_of_its_own(tmp_path, limit):
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    run = tinyjax.training.checkpoint.Checkpoint(0, {"big": jnp.asarray(noise)}, None, tinyjax.Sites([]))
    with full_disk(limit), pytest.raises(OSError, match=r"could not save .*/new/0: ") as caught:
        tinyjax.save(tmp_path / "new", run)
    assert caught.value.__suppress_context__ and not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, 1, 50_000])
@pytest.mark.parametrize("where", ["net.npz", "new/deep/net.npz"])
def test_an_export_to_a_full_disk_leaves_nothing(tmp_path, limit, where):
    noise = jnp.asarray(np.random.default_rng(0).integers(0, 256, 100_000, np.uint8))
    with full_disk(limit), pytest.raises(OSError, match=r"could not export .*net\.npz: ") as caught:
        tinyjax.export(tmp_path / where, {"big": noise}, tinyjax.Sites([]))
    assert caught.value.__suppress_context__ and not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(whole, tmp_path):
    """Neither when it is the oldest and its turn to be removed has come, nor when it is read."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    run = saved_at(tmp_path / "run", whole[1])
    (run / "1").symlink_to(elsewhere)
    saved_at(run, whole[2])
    with pytest.raises(OSError, match="symbolic link"):
        saved_at(run, whole[3])
    with pytest.raises(ValueError, match="run/1 is damaged"):
        tinyjax.restore(run, make_optimizer(), step=1)
    assert tinyjax.restore(run, make_optimizer()).step == 4
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]


def test_a_newer_format_is_refused(whole, tmp_path):
    saved_at(tmp_path, whole[0])
    path = tmp_path / "1" / "record" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this tinyjax reads up to 1: upgrade tinyjax"):
        tinyjax.restore(tmp_path, make_optimizer())


@pytest.mark.parametrize("extra", [object(), {"x": {1, 2}}, np.array([object()]), {(1, 2): 3}])
def test_what_would_need_pickle_is_refused_before_anything_is_written(whole, tmp_path, extra):
    with pytest.raises(ValueError, match="can not be saved"):
        saved_at(tmp_path / "run", whole[0], extra=extra)
    assert not (tmp_path / "run").exists()


def test_misuse(whole, tmp_path):
    with pytest.raises(ValueError, match="`keep` must be at least 1, got 0"):
        tinyjax.save(tmp_path, whole[0], keep=0)
    with pytest.raises(ValueError, match=r"`path` must end in \.npz, got net\.pkl"):
        tinyjax.export(tmp_path / "net.pkl", whole[0].params, whole[0].sites)


# Nothing that is read can run code or write elsewhere.

WATCHED = {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "marshal.loads", "code.__new__"}
EVENTS = []
LISTENING = []


def listen(event, arguments):
    if not LISTENING:
        return
    if event in WATCHED:
        EVENTS.append((event, arguments))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        EVENTS.append((event, arguments))


sys.addaudithook(listen)


@pytest.fixture
def events():
    EVENTS.clear()
    LISTENING.append(True)
    yield EVENTS
    LISTENING.clear()


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran_code",)


def test_a_crafted_checkpoint_runs_nothing_and_writes_nothing(whole, tmp_path, monkeypatch, request):
    """Names that point elsewhere, a dtype of objects, a pickle in the place of every file: no more than an error."""
    import hashlib
    import pickle

    monkeypatch.chdir(tmp_path)
    run = saved_at(tmp_path / "run", whole[0])
    tinyjax.restore(run, make_optimizer())  # whatever is imported on the way
    record = run / "1" / "record" / "metadata"
    original = json.loads(record.read_text())

    def reseal(change):
        content = json.loads(json.dumps(original["record"]))
        change(content)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({"format": 1, "digest": digest, "record": content}).encode()

    def rename(content):
        content["params"][0][0] = "../../elsewhere"

    objects = {"dtype": "O", "shape": [1], "key": None, "data": "AAAAAAAAAAA="}
    crafted = [
        (record, reseal(rename)),
        (record, reseal(lambda c: c["params"][0].__setitem__(1, "object"))),
        (record, reseal(lambda c: c.__setitem__("extra", ["leaf", objects]))),
        (record, reseal(lambda c: c.__setitem__("structure", ["os.system", ["touch ran_code"]]))),
        *((path, pickle.dumps(Payload())) for path in files(run)),
    ]
    before = {path: path.read_bytes() for path in files(tmp_path)}
    events = request.getfixturevalue("events")
    refused = 0
    for path, content in crafted:
        kept = path.read_bytes()
        LISTENING.clear()
        path.write_bytes(content)
        LISTENING.append(True)
        try:
            tinyjax.restore(run, make_optimizer())
        except (ValueError, KeyError):
            refused += 1
        LISTENING.clear()
        path.write_bytes(kept)
    assert refused >= 6 and not events
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_the_library_never_unpickles():
    import ast

    for path in Path(tinyjax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "__import__"}, path


def test_an_export_is_read_by_numpy_alone(whole, tmp_path):
    last = whole[-1]
    path = tmp_path / "sub" / "net.npz"
    assert tinyjax.export(path, last.params, last.sites) == {"w": 10}
    with np.load(path, allow_pickle=False) as file:
        header = json.loads(str(file["__tinyjax__"]))
        assert header == {"format": 1, "widths": {"w": 10}, "dtypes": dict.fromkeys("bcuw", "float64")}
        small = {name: file[name] for name in header["dtypes"]}
    assert small["w"].shape == (5, 10)
    batch = make_batches(1)[0]
    np.testing.assert_allclose(loss_fn(small, batch), loss_fn(last.params, batch), rtol=1e-12)
    assert [p.name for p in path.parent.iterdir()] == ["net.npz"]


READER = """
import json, sys
sys.modules.update(dict.fromkeys(["tinyjax", "jax", "flax", "optax", "orbax"]))
import numpy as np
with np.load(sys.argv[1], allow_pickle=False) as file:
    print(json.loads(str(file["__tinyjax__"]))["widths"])
    hidden = np.tanh(np.ones((2, 5)) @ file["w"] + file["b"])
    print(repr(float((hidden @ file["u"] + file["c"]).sum())))
"""


def test_an_export_is_read_in_a_process_that_has_only_numpy(whole, tmp_path):
    last = whole[-1]
    tinyjax.export(tmp_path / "net.npz", last.params, last.sites)
    command = [sys.executable, "-I", "-c", READER, str(tmp_path / "net.npz")]
    widths, total = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    hidden = jnp.tanh(jnp.ones((2, 5)) @ last.params["w"] + last.params["b"])
    assert widths == "{'w': 10}"
    np.testing.assert_allclose(float(total), (hidden @ last.params["u"] + last.params["c"]).sum(), rtol=1e-12)


def test_an_export_holds_what_numpy_has_no_type_for(tmp_path):
    params = {"h": jnp.array([1.5, -2.25], jnp.bfloat16), "i": jnp.array([-3, 5], jnp.int4), "k": jax.random.key(5)}
    tinyjax.export(tmp_path / "net.npz", params, tinyjax.Sites([]))
    with np.load(tmp_path / "net.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["h"], np.float32([1.5, -2.25]))
        np.testing.assert_array_equal(file["i"], np.int8([-3, 5]))
        np.testing.assert_array_equal(file["k"], jax.random.key_data(jax.random.key(5)))
        assert json.loads(str(file["__tinyjax__"]))["dtypes"]["h"] == "bfloat16"


def test_a_failed_export_leaves_the_old_file(whole, tmp_path, monkeypatch):
    path = tmp_path / "net.npz"
    path.write_bytes(b"old")

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tinyjax.export(path, whole[0].params, whole[0].sites)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def interrupts():
    """Python's own answer to Ctrl-C, which a process in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_the_first_interrupt_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    done = []
    with tinyjax.stop_on_interrupt() as stopped:
        for step in range(5):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            done.append(step)
            if stopped():
                break
        assert done == [0, 1, 2]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            [None for _ in range(10**6)]
    assert signal.getsignal(signal.SIGINT) is before


def two_layers():
    rng = np.random.default_rng(0)
    shapes = dict(w1=(5, 8), w2=(8, 6), w3=(6, 3))
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def two_layer_loss(params, batch):
    hidden = jnp.tanh(jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"])
    return jnp.mean((hidden @ params["w3"] - batch["t"]) ** 2)


def test_a_site_that_grows_on_alone_draws_what_it_would_have_drawn():
    """The unbroken run reuses the program of both sites when one is full; so must the resumed one."""
    batches, optimizer = make_batches(4), optax.sgd(0.1)
    sites = tinyjax.find_sites(two_layer_loss, two_layers(), batches[0])
    first, second = sites.names
    start = tinyjax.thin(two_layers(), sites, 2)
    schedule = tinyjax.every(1, 1, final={first: 3, second: 5})
    run = partial(tinyjax.fit, two_layer_loss, num_neurons=1, growth_samples=16, sites=sites, **CHEAP)
    whole = list(run(start, batches, optimizer, schedule, KEY))
    saved = whole[1]
    resumed = list(
        run(
            saved.params,
            batches[2:],
            optimizer,
            schedule,
            KEY,
            opt_state=saved.opt_state,
            step=saved.step,
            history=saved.history,
        )
    )
    chex.assert_trees_all_equal(resumed[-1].params, whole[-1].params)
