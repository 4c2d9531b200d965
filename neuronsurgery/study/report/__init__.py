"""The report of a study run, or of several seeds: its table in, one page and its charts out.

Nothing else is read: no checkpoint, no data, no clock. `answers` is the first screen, `sections` what follows it,
`writing` the files.
"""

from neuronsurgery.study.report.writing import write_report as write_report
