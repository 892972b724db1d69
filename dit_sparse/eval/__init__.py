"""How close a sparse clip is to its dense twin, and what it cost."""
