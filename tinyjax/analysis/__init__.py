"""Where and what to grow: bottlenecks by layer, scores of sites and of new connections.

Enters: a loss, parameters, a batch. Leaves: numbers to read or to sort by; nothing is changed. Read first:
`diagnosis.py`.
"""

from tinyjax.analysis.diagnosis import Diagnosis as Diagnosis
from tinyjax.analysis.diagnosis import Finding as Finding
from tinyjax.analysis.diagnosis import diagnose as diagnose
from tinyjax.analysis.edge_scores import Edge as Edge
from tinyjax.analysis.edge_scores import score_edges as score_edges
from tinyjax.analysis.site_scores import Score as Score
from tinyjax.analysis.site_scores import gauss_newton as gauss_newton
from tinyjax.analysis.site_scores import score_sites as score_sites
