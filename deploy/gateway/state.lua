-- What service/gateway tells nginx when it starts and while it runs: where the replicas are, which of
-- them get no requests, and whose keys are known. nginx is never reloaded for it: its old workers would
-- close the connections that clients keep open, and a request that is just then sent on one is lost.
local cjson = require "cjson.safe"
local told = ngx.shared.told

local state = {}

local version, last -- of what was told, and that, decoded, for this nginx worker

-- `upstreams` and `management` are lists of IP:PORT; `left_out` says by upstream `why` it gets no
-- requests, and whether it `is_silent`; `clients` has "granted NAME" or "disabled NAME" by a key's sha256.
function state.now()
    local newest = told:get "version"
    if newest ~= version then
        version, last = newest, cjson.decode(told:get "text")
    end
    return last
end

-- Keep what is told, as JSON; false if it is none.
function state.keep(text)
    if type(cjson.decode(text or "")) ~= "table" or not told:set("text", text) then
        return false
    end
    return told:incr("version", 1, 0) ~= nil
end

-- As service/gateway/process.py has written it before nginx started.
function state.read()
    local file = assert(io.open(ngx.config.prefix() .. "state.json"))
    assert(state.keep(file:read "*a"))
    file:close()
end

-- As service/gateway/watch.py sends it.
function state.take()
    ngx.req.read_body()
    ngx.exit(state.keep(ngx.req.get_body_data()) and 204 or 400)
end

return state
