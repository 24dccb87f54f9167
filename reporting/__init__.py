"""What report.py makes its page of: reading runs, choosing series, drawing, tables, the page."""
