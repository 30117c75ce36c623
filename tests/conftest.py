"""The suite runs in float64 on four fake CPU devices, with array annotations checked at call time.

Compiling is most of its work, so XLA is told not to optimise; `JAX_DISABLE_MOST_OPTIMIZATIONS=0` runs it as users do.
"""

import os
from pathlib import Path

# All are read when JAX is first imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads spin: on a busy machine they wait for each other
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
# Tests prepare data sets once, inside the checkout, and leave the user's cache alone.
os.environ.setdefault("TINYJAX_DATA_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "data"))

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
# Modules whose array annotations hold at run time; must come before the first import of tinyjax.
install_import_hook(["tinyjax.data", "tinyjax.models", "tinyjax.linalg"], "beartype.beartype")
