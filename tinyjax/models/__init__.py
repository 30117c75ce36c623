"""Models in plain Flax Linen: nothing in them knows tinyjax, every hidden width is a constructor argument.

Enters: widths. Leaves: Flax modules. Read first: `mlp.py`; `norms.py` for what may stand along a grown axis.
"""

from tinyjax.models.dropout import UnitDropout as UnitDropout
from tinyjax.models.dropout import unit_dropout as unit_dropout
from tinyjax.models.mlp import MLP as MLP
from tinyjax.models.norms import WidthGroupNorm as WidthGroupNorm
from tinyjax.models.norms import WidthLayerNorm as WidthLayerNorm
from tinyjax.models.norms import WidthRMSNorm as WidthRMSNorm
from tinyjax.models.norms import width_group_norm as width_group_norm
from tinyjax.models.norms import width_layer_norm as width_layer_norm
from tinyjax.models.norms import width_rms_norm as width_rms_norm
from tinyjax.models.resnet import ResNet18 as ResNet18
from tinyjax.models.resnet import inner_widths as inner_widths
from tinyjax.models.vgg import VGG as VGG
from tinyjax.models.vgg import VGG11 as VGG11
from tinyjax.models.vgg import VGG16 as VGG16
