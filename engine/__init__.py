"""The live engine: policies, model, service, ledger. It never imports the twin."""
