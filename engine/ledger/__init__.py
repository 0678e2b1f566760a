"""What happened: the journal that can be replayed."""
