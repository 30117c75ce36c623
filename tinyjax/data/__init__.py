"""Data sets as arrays in memory; tensorflow-datasets is the only door, and TensorFlow is not needed.

Enters: the name of a data set. Leaves: uint8 arrays, and batches of floats made of them. Read first: `loading.py`.
"""

from tinyjax.data.augmentation import augment as augment
from tinyjax.data.augmentation import epoch_key as epoch_key
from tinyjax.data.batching import Batch as Batch
from tinyjax.data.batching import as_batch as as_batch
from tinyjax.data.batching import batches as batches
from tinyjax.data.batching import channel_moments as channel_moments
from tinyjax.data.batching import epoch_order as epoch_order
from tinyjax.data.loading import Dataset as Dataset
from tinyjax.data.loading import Split as Split
from tinyjax.data.loading import join as join
from tinyjax.data.loading import load as load
