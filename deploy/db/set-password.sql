-- Gives the database the password that stands in .env: docker compose exec db psql -U awschat -f /deploy/set-password.sql
-- (after `docker compose up` has passed the new one to the container).
\getenv password POSTGRES_PASSWORD
ALTER ROLE awschat PASSWORD :'password';
