"""Leaf helpers at the paths that DomainBed's users import; closed to new code."""
