"""The suite runs in float64 on four fake CPU devices, with every annotation of the library checked at call time."""

import os

# Both are read when JAX is first imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
install_import_hook("tinyjax", "beartype.beartype")  # must come before the first import of tinyjax
