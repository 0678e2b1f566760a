"""How good the answers of the response caches are: data, replays, fits and rates with intervals."""
