"""The report of a study run, or of several seeds: its table in, one page and its charts out.

Nothing else is read: no checkpoint, no data, no clock. `figures` makes the charts, `writing` the files; what the page
says is in `pages/study.html`.
"""

from neuronsurgery.study.report.writing import write_report as write_report
