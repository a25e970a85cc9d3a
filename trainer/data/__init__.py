"""Data for training: reading, curation, statistics, splits, graph store and batches."""

from mlip_md.trainer.data.batching import Batch as Batch
from mlip_md.trainer.data.batching import BatchBudget as BatchBudget
from mlip_md.trainer.data.batching import iterate_batches as iterate_batches
from mlip_md.trainer.data.batching import make_batch as make_batch
from mlip_md.trainer.data.batching import plan_epoch as plan_epoch
from mlip_md.trainer.data.filters import CurationReport as CurationReport
from mlip_md.trainer.data.isolated import IsolatedAtoms as IsolatedAtoms
from mlip_md.trainer.data.labels import LabelKeys as LabelKeys
from mlip_md.trainer.data.prepared import PreparedData as PreparedData
from mlip_md.trainer.data.prepared import open_prepared as open_prepared
from mlip_md.trainer.data.prepared import prepare as prepare
from mlip_md.trainer.data.readers import iterate as iterate
from mlip_md.trainer.data.readers import read as read
from mlip_md.trainer.data.readers import read_atomic_energies as read_atomic_energies
from mlip_md.trainer.data.rejected import write_rejected as write_rejected
from mlip_md.trainer.data.sources import Reading as Reading
from mlip_md.trainer.data.sources import is_prepared as is_prepared
from mlip_md.trainer.data.statistics import Statistics as Statistics
from mlip_md.trainer.data.statistics import compute_statistics as compute_statistics
from mlip_md.trainer.data.statistics import fit_atomic_energies as fit_atomic_energies
from mlip_md.trainer.data.store import GraphStore as GraphStore
from mlip_md.trainer.data.store import open_store as open_store
from mlip_md.trainer.data.structures import LabeledStructure as LabeledStructure
from mlip_md.trainer.data.training import TrainingData as TrainingData
from mlip_md.trainer.data.training import describe_reading as describe_reading
from mlip_md.trainer.data.training import load_data as load_data
