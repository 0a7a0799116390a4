"""What surgeon finds and does, as tables for terminals and notebooks and as plain data for JSON.

There is one file for each thing that is shown. A file here uses only the attributes of what it shows and imports none
of its classes, so that surveys, plans and reports, whose packages lie below, can import how they look.
"""
