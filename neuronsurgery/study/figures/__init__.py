"""The figures of the report: values in, one SVG document out, as text.

Every function is pure, draws by hand (no plotting library), and gives the same bytes for the same values. Colours are
those of Okabe and Ito (2008), told apart with any colour vision; what colour says is said again by a hatch, a marker, a
number or a word, so that a grey print reads the same. Minority groups are hatched in bars and drawn thick in lines.
"""

from neuronsurgery.study.figures.bars import grouped_bars as grouped_bars
from neuronsurgery.study.figures.bars import histogram_pair as histogram_pair
from neuronsurgery.study.figures.bars import sensitive_bars as sensitive_bars
from neuronsurgery.study.figures.dots import dot_ranges as dot_ranges
from neuronsurgery.study.figures.dots import strips as strips
from neuronsurgery.study.figures.images import Picture as Picture
from neuronsurgery.study.figures.images import contact_sheet as contact_sheet
from neuronsurgery.study.figures.images import data_uri as data_uri
from neuronsurgery.study.figures.images import image_rows as image_rows
from neuronsurgery.study.figures.images import pixels_of as pixels_of
from neuronsurgery.study.figures.images import png as png
from neuronsurgery.study.figures.lines import depth_lines as depth_lines
from neuronsurgery.study.figures.lines import trajectories as trajectories
from neuronsurgery.study.figures.marks import GREY as GREY
from neuronsurgery.study.figures.marks import GROUP_COLOURS as GROUP_COLOURS
from neuronsurgery.study.figures.marks import HIGHLIGHT as HIGHLIGHT
from neuronsurgery.study.figures.marks import ORDERED_COLOURS as ORDERED_COLOURS
from neuronsurgery.study.figures.marks import Mark as Mark
from neuronsurgery.study.figures.marks import Series as Series
from neuronsurgery.study.figures.marks import drawn_limits as drawn_limits
from neuronsurgery.study.figures.marks import extent_of as extent_of
from neuronsurgery.study.figures.marks import limits_of as limits_of
from neuronsurgery.study.figures.marks import number as number
from neuronsurgery.study.figures.marks import signed as signed
from neuronsurgery.study.figures.rows import dot_rows as dot_rows
