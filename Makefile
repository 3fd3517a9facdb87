.PHONY: check test

check:  ## lint, format, types
	uv run ruff check .
	uv run ruff format --check .
	uv run pyright

test:  ## all tests; `uv run pytest -m "not slow"` leaves out real weights, oracles and kills
	uv run pytest
