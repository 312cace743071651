"""Pictures: the only place that knows matplotlib.

`runs` draws the curves of a run and where a network looks, `costs` how costs grow, `sweeps` what came out of a sweep.
"""

from aaconv.plots.costs import scaling as scaling
from aaconv.plots.runs import QUERIES as QUERIES, attention_maps as attention_maps, curves as curves
from aaconv.plots.style import check_installed as check_installed, png as png, svg as svg
