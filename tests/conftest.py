"""The suite runs in float64 on four fake CPU devices, with array annotations checked at call time.

Compiling is most of its work, so XLA is told not to optimise; `JAX_DISABLE_MOST_OPTIMIZATIONS=0` runs it as users do.
"""

import gc
import importlib.metadata
import os
from pathlib import Path

# All are read when JAX is first imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads spin: on a busy machine they wait for each other
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
# The programs are small, and so are the machines: each is compiled in one part. XLA's new emitters take twice as long;
# later releases have no others, and no flag.
os.environ["XLA_FLAGS"] += (
    ""
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"
    else " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)
# Tests prepare data sets once, inside the checkout, and leave the user's cache alone.
os.environ.setdefault("TINYJAX_DATA_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "data"))

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
# Modules whose array annotations hold at run time; must come before the first import of tinyjax.
install_import_hook(["tinyjax.data", "tinyjax.models", "tinyjax.core.linalg"], "beartype.beartype")

MAPS = Path("/proc/self/maps")  # memory mappings of this process, a line each; Linux only
MOST_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
    """Drops compiled programs before they exhaust what Linux maps for a process (65,530): XLA would crash there.

    Programs that stay are out of the garbage collector's sight: it would walk them all again at every collection.
    """
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
    gc.freeze()
