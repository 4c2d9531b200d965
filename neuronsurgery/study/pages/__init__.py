"""Pages that hold all they need: templates, charts and the script that draws them; of the study and of the audit.

`charts` makes what is drawn, `rendering` the page around it. A page loads nothing and works from a file.
"""

from neuronsurgery.study.pages.charts import Figure as Figure
from neuronsurgery.study.pages.charts import Look as Look
from neuronsurgery.study.pages.rendering import exports as exports
from neuronsurgery.study.pages.rendering import render as render
