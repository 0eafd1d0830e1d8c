.PHONY: test test-all demo lint format
test:
	bash scripts/test.sh
test-all:
	bash scripts/test.sh -m "slow or not slow"
demo:
	bash scripts/demo.sh
lint:
	ruff check . && ruff format --check .
format:
	ruff check --fix . && ruff format .
