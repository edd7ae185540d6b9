"""Checks, repairs, copies and searches existing stores."""
