"""The mathematics of docs/method.md and docs/pretraining.md. It knows neither Ray nor MLflow."""
