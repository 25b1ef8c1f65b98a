"""The only code that knows Ray, DeepSpeed and MLflow: shards -> checkpoint -> registry."""
