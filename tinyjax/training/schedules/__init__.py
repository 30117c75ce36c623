"""When to grow and how much: schedules, what restrains them, what growth costs.

Enters: the step, the widths, the history of growths. Leaves: how many neurons at which site. Read first: `basic.py`.
"""

from tinyjax.training.schedules.basic import Schedule as Schedule
from tinyjax.training.schedules.basic import early as early
from tinyjax.training.schedules.basic import every as every
from tinyjax.training.schedules.basic import most_gain as most_gain
from tinyjax.training.schedules.basic import round_robin as round_robin
from tinyjax.training.schedules.limits import budget as budget
from tinyjax.training.schedules.limits import plateau as plateau
from tinyjax.training.schedules.limits import worthwhile as worthwhile
