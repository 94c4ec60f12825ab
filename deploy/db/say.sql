-- One line for the log of the database, without the statement behind it.
SET log_error_verbosity = terse;
SET log_min_error_statement = panic;
DO $$ BEGIN
    RAISE LOG 'This volume has another password than POSTGRES_PASSWORD. Put the old one back into .env; or give it the new one with  docker compose exec db psql -U awschat -f /deploy/set-password.sql  and after 10 s start again.';
END $$;
