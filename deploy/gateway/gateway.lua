-- What nginx's own directives cannot express: keys by their hash, and predictions with a second try at
-- another replica, whose errors take the form of the handler's. Beside it: bodies with a limit in time,
-- places, replicas, and health.
local bodies = require "bodies"
local cjson = require "cjson.safe"
local errors = require "errors"
local ffi = require "ffi"
local places = require "places"
local replicas = require "replicas"
local rollout = require "rollout"
local settings = require "settings"
local state = require "state"
local feedback = settings.feedback_requests > 0 and require "feedback"

-- OpenSSL's own, which nginx is linked with.
ffi.cdef "unsigned char *SHA256(const unsigned char *data, size_t size, unsigned char *digest);"
local digest = ffi.new "unsigned char[32]"

local gateway = {}

-- Who asks, by the API key: "granted NAME", "disabled NAME", or "missing". Looking the key's sha256 up in
-- a table tells a client nothing by how long it takes: that depends on the digest, and whoever could
-- choose digests at will would have broken sha256. Where no key is needed, `nobody` is said for missing.
function gateway.who_asks(nobody)
    if ngx.is_subrequest then -- of a request whose key has been looked at
        return ngx.var.asking
    end
    local key = (ngx.var.http_authorization or ""):match "^[Bb][Ee][Aa][Rr][Ee][Rr] +(%S+)$"
    key = key or ngx.var.http_x_api_key
    if not key or key == "" then
        return nobody or "missing"
    end
    ffi.C.SHA256(key, #key, digest)
    local hash = ffi.string(digest, 32):gsub(".", function(byte)
        return ("%02x"):format(byte:byte())
    end)
    return state.now().clients[hash] or nobody or "missing"
end

-- The seconds that a try may take: those of its location, or what a client still waits that sent
-- X-Request-Timeout. nil if that makes no sense, which the handler then says.
local function time_left(location, asked)
    local seconds = settings.seconds[location]
    if not asked or asked == "" then
        return seconds
    end
    local wait = ngx.re.match(asked, [[^\d{1,9}(\.\d{1,9})?$]], "jo") and tonumber(asked)
    return wait and math.min(seconds, wait - (ngx.now() - ngx.req.start_time()))
end

-- Asks a replica for `target`. A worker that gets to the request only after the time it has drops it.
local function ask(location, replica, target, asked)
    local seconds = time_left(location, asked)
    if seconds and seconds <= 0 then
        ngx.exit(504)
    elseif seconds then
        ngx.req.set_header("X-Request-Timeout", ("%.3f"):format(seconds))
    end
    local connection = ngx.var.connection
    replicas.enter(connection, replica)
    local since = ngx.now()
    local reply = ngx.location.capture(location .. replica .. target, {
        method = ngx.HTTP_POST,
        args = ngx.var.args,
        always_forward_body = true,
    })
    replicas.leave(connection)
    local logged = {
        address = replica,
        status = reply.status,
        seconds = ("%.3f"):format(ngx.now() - since),
    }
    if reply.truncated and reply.status < 500 then -- its connection broke off
        reply = { status = 502, header = {}, body = "" }
    end
    reply.logged = logged
    reply.by_handler = reply.header["X-Model-Version"] ~= nil
    if reply.by_handler and reply.status < 500 then
        replicas.has_answered(replica)
    end
    return reply
end

-- For the log: what one try has of this name, or both.
local function tried(name, first, second)
    if second then
        return first.logged[name] .. " : " .. second.logged[name]
    end
    return first.logged[name]
end

-- A request has ended, perhaps before its body or its answer was complete.
function gateway.leave()
    local connection = ngx.var.connection
    bodies.forget(connection)
    replicas.leave(connection)
    places.leave(connection)
    rollout.leave(connection)
end

-- Where to try a request again, or nil: predictions change nothing, so that they may be. An error
-- that the handler gives would come again, unless it is memory or the GPU (507); a worker that died (500,
-- and 507 after kill -9) has neighbours even in a replica that is alone.
local function try_again_at(reply, tried)
    if reply.status == 507 or reply.status == 500 and not reply.by_handler then
        return replicas.another_than(tried) or tried
    elseif reply.status >= 502 and reply.status <= 504 and not reply.by_handler then
        return replicas.another_than(tried)
    end
end

-- TorchServe's own status as a client of the gateway should see it.
local SEEN_AS = { [502] = 503, [507] = 500 }

function gateway.predict()
    if not places.take() then
        return ngx.exit(429)
    end
    local replica = replicas.first()
    local asked = ngx.var.http_x_request_timeout -- each try sets what is left of it
    local target, trial = rollout.choose(ngx.var.target)
    local is_alone = not replicas.another_than(replica)
    local first = ask(is_alone and "/_only/" or "/_first/", replica, target, asked)
    local of_old = trial and rollout.finish(trial, first, asked)
    local other = of_old and replica or try_again_at(first, replica)
    local second = other and ask(is_alone and "/_only/" or "/_second/", other, of_old or target, asked)
    local reply = second or first
    ngx.var.tried_addresses = tried("address", first, second)
    ngx.var.tried_statuses = tried("status", first, second)
    ngx.var.tried_seconds = tried("seconds", first, second)
    ngx.var.torchserve_id = reply.header["x-request-id"] or ""
    ngx.var.version_answered = reply.header["X-Model-Version"] or ""
    if reply.status >= 400 and not reply.by_handler then
        ngx.status = SEEN_AS[reply.status] or reply.status
        ngx.header["Content-Type"] = "application/json"
        -- TorchServe's message, if it tells the client something.
        local content = reply.status < 500 and cjson.decode(reply.body)
        local theirs = type(content) == "table" and content.message
        local text = errors.body(theirs)
        ngx.header["Content-Length"] = #text
        return ngx.print(text)
    end
    if feedback and reply.status == 200 then
        feedback.remember(reply.header)
    end
    ngx.status = reply.status
    ngx.header["Content-Type"] = reply.header["Content-Type"]
    ngx.header["X-Model-Version"] = reply.header["X-Model-Version"]
    -- Of an answer with binary tensors: where they begin.
    ngx.header["Inference-Header-Content-Length"] = reply.header["Inference-Header-Content-Length"]
    ngx.header["Content-Length"] = #reply.body
    ngx.print(reply.body)
    if trial then
        rollout.shadow(trial, reply, replica)
    end
end

return gateway
