"""From records to tables, figures and a report; needs no torch."""
