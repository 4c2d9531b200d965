"""The audit of a trained network: accuracy, who is fragile, and which few neurons carry the worst group."""

from neuronsurgery.study.audit.auditing import audit as audit
from neuronsurgery.study.audit.auditing import plan as plan
from neuronsurgery.study.audit.examples import Examples as Examples
from neuronsurgery.study.audit.examples import Table as Table
from neuronsurgery.study.audit.examples import from_folders as from_folders
from neuronsurgery.study.audit.examples import from_loader as from_loader
from neuronsurgery.study.audit.examples import from_table as from_table
from neuronsurgery.study.audit.examples import from_texts as from_texts
from neuronsurgery.study.audit.page import write_audit as write_audit
from neuronsurgery.study.audit.planning import Plan as Plan
from neuronsurgery.study.audit.results import Audit as Audit
