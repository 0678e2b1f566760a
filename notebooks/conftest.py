"""Notebooks under pytest are run by nbmake, in the small profile unless DOORBUSTER_PROFILE says otherwise."""

import os

os.environ.setdefault("DOORBUSTER_PROFILE", "ci")
