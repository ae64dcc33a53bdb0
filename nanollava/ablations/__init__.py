"""Ablations: rows of changed keys -> runs -> results -> verdicts -> pages."""
