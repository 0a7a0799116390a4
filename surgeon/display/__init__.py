"""What surgeon finds and does, as tables for terminals and notebooks and as plain data for JSON.

One file for each thing that is shown. They know what they show by its attributes alone and import none of it, so that
surveys, plans and reports, whose packages lie below, can import how they look.
"""
