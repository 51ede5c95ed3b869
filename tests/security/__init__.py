"""Attacks and faults: what may not be read, written, run, shown or waited for."""
