"""The report of a run: one page that needs nothing but a browser, made from the files of the run folder alone."""

from mim.report.page import write_report as write_report
