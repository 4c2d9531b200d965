"""The report of a study run, or of several seeds: `results.json` in, one page, its tables and its figures out.

Nothing else is read: no checkpoint, no data, no clock. Every sentence is derived from the numbers by the rules that the
page itself states under "How to read this": an effect on a group is seen where the interval of its change excludes 0.

Imports run one way: `effects`, `wording`, `levels`, `tables` (what the numbers say), `section`, `page` (what a page is
made of), `whole_model`, `ranks`, `layers`, `controls` (Stage 1), `stage_two`, `fragility` (the
chapters after it), `seeds` (what only several runs have), `opening`, `contents` (which of them, in which order),
`writing` (the files).
"""

from neuronsurgery.study.report.writing import write_report as write_report
